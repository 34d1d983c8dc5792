"""What a Checkpointer decides by: rules of retention, small, pure, put together with `|`; what a failed save leads to.

    KeepLast(3) | KeepEvery(1000) | KeepBest("eval/loss")

keeps what any of the three keeps. Whatever a rule says, the newest checkpoint stays; `catalog/retention.py` holds that.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, get_args

from stillframe.errors import OptionError
from stillframe.records import CatalogEntry


class RetentionPolicy(ABC):
    """A rule of retention; make your own by deriving from it."""

    __slots__ = ()

    @abstractmethod
    def kept(self, entries: Sequence[CatalogEntry], *, now: datetime) -> frozenset[CatalogEntry]:
        """Those of `entries`, checkpoints of one family and branch, oldest publication first, that are kept at `now`.

        `now` has a time zone. Called on rank 0, in the background, after each publication: decide by the entries alone,
        and touch no file.
        """

    def __or__(self, other: RetentionPolicy) -> RetentionPolicy:
        """The rule that keeps what either keeps."""
        return KeepAny((self, other)) if isinstance(other, RetentionPolicy) else NotImplemented


@dataclass(frozen=True, slots=True)
class KeepAll(RetentionPolicy):
    """Keeps everything."""

    def kept(self, entries: Sequence[CatalogEntry], *, now: datetime) -> frozenset[CatalogEntry]:
        return frozenset(entries)


@dataclass(frozen=True, slots=True)
class KeepLast(RetentionPolicy):
    """Keeps the `count` that were published last."""

    count: int

    def __post_init__(self) -> None:
        _require_positive("KeepLast", "count", self.count)

    def kept(self, entries: Sequence[CatalogEntry], *, now: datetime) -> frozenset[CatalogEntry]:
        return frozenset(entries[-self.count :])


@dataclass(frozen=True, slots=True)
class KeepEvery(RetentionPolicy):
    """Keeps those whose step is a multiple of `steps`, for ever."""

    steps: int

    def __post_init__(self) -> None:
        _require_positive("KeepEvery", "steps", self.steps)

    def kept(self, entries: Sequence[CatalogEntry], *, now: datetime) -> frozenset[CatalogEntry]:
        return frozenset(entry for entry in entries if entry.step % self.steps == 0)


@dataclass(frozen=True, slots=True)
class KeepBest(RetentionPolicy):
    """Keeps the `count` with the lowest `metric`, or with the highest where `mode` is "max"; of equal ones the newer.

    Checkpoints that were saved without the metric are not kept by this rule.
    """

    metric: str
    count: int = 1
    mode: str = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise OptionError(f"KeepBest: metric must be the name of a metric, not {self.metric!r}")
        _require_positive("KeepBest", "count", self.count)
        if self.mode not in ("min", "max"):
            raise OptionError(f"KeepBest: mode must be 'min' (the lowest is the best) or 'max', not {self.mode!r}")

    def kept(self, entries: Sequence[CatalogEntry], *, now: datetime) -> frozenset[CatalogEntry]:
        sign = 1 if self.mode == "min" else -1
        # A metric that is no number (the loss of a step that diverged) is none.
        newest_first = [e for e in reversed(entries) if not math.isnan(e.metrics.get(self.metric, math.nan))]
        return frozenset(sorted(newest_first, key=lambda entry: sign * entry.metrics[self.metric])[: self.count])


@dataclass(frozen=True, slots=True)
class KeepYoungerThan(RetentionPolicy):
    """Keeps those that were published less than `seconds` ago, by the clocks of whoever published and of this host."""

    seconds: float

    def __post_init__(self) -> None:
        seconds = self.seconds
        # Compared before it is converted: an integer may be too large for a float. NaN compares false.
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 10**12:
            raise OptionError(
                f"KeepYoungerThan: seconds must be a number above 0 and at most 10^12, not {seconds!r:.60}"
            )

    def kept(self, entries: Sequence[CatalogEntry], *, now: datetime) -> frozenset[CatalogEntry]:
        return frozenset(entry for entry in entries if self._is_younger(entry, now))

    def _is_younger(self, entry: CatalogEntry, now: datetime) -> bool:
        published = entry.published_time
        # Of unknown age: not to be deleted for its age.
        return published is None or (now - published) < timedelta(seconds=self.seconds)


@dataclass(frozen=True, slots=True)
class KeepAny(RetentionPolicy):
    """Keeps what at least one of `policies` keeps; `a | b` is `KeepAny((a, b))`."""

    policies: Sequence[RetentionPolicy]

    def __post_init__(self) -> None:
        policies = self.policies
        if not isinstance(policies, Sequence) or not all(isinstance(policy, RetentionPolicy) for policy in policies):
            raise OptionError(f"KeepAny: policies must be a sequence of retention policies, not {policies!r}")
        if not policies:
            raise OptionError("KeepAny: policies is empty; without a rule nothing but the newest would be kept")
        object.__setattr__(self, "policies", tuple(policies))

    def kept(self, entries: Sequence[CatalogEntry], *, now: datetime) -> frozenset[CatalogEntry]:
        return frozenset[CatalogEntry]().union(*(policy.kept(entries, now=now) for policy in self.policies))


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The rules of a run: `checkpoints` of what is resumed from, `exports` of Hugging Face directories."""

    checkpoints: RetentionPolicy
    exports: RetentionPolicy


FailureAction = Literal["raise", "abort", "continue"]


@dataclass(frozen=True, slots=True)
class OnFailure:
    """What a save that failed in the background leads to, on every rank.

    "raise": the next call of the Checkpointer raises it. "abort": the process ends at once, with status
    `ABORT_STATUS`; the other ranks' end likewise, and no signal is sent to anybody. "continue": it is logged, and
    training goes on, for at most `at_most` failures in a row; the one after them is raised.
    """

    action: FailureAction
    at_most: int = 3

    def __post_init__(self) -> None:
        if self.action not in get_args(FailureAction):
            raise OptionError(
                f"OnFailure: action must be one of {', '.join(get_args(FailureAction))}, not {self.action!r}"
            )
        _require_positive("OnFailure", "at_most", self.at_most)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicies:
    """What failures of exports lead to, and those of all else."""

    checkpoints: OnFailure
    exports: OnFailure


ABORT_STATUS = 74
"""The exit status of a process that `OnFailure("abort")` ends: EX_IOERR of sysexits.h."""


def _require_positive(policy: str, name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{policy}: {name} must be an integer of at least 1, not {value!r}")
