"""What went wrong on one rank, as the others are told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillframe import errors
from stillframe.errors import SaveFailed, StillframeError

_MAX_NAMED_RANKS = 16
_TOLD = re.compile(r"rank ([0-9]+): (.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What went wrong, where; `error` is the name of a class in `stillframe.errors`."""

    error: str
    rank: int | None
    stage: str
    reason: str

    @staticmethod
    def of(error: BaseException, *, rank: int, stage: str) -> Failure:
        if isinstance(error, SaveFailed):
            return Failure(error=type(error).__name__, rank=error.rank, stage=error.stage, reason=error.reason)
        if isinstance(error, StillframeError):
            # One that came from another rank, by `exception` below, stays that rank's.
            told = _TOLD.fullmatch(str(error))
            rank, reason = (int(told[1]), told[2]) if told else (rank, str(error))
            return Failure(error=type(error).__name__, rank=rank, stage=stage, reason=reason)
        return Failure(error="SaveFailed", rank=rank, stage=stage, reason=f"{type(error).__name__}: {error}")

    def exception(self, *, step: int | None, path: Path) -> StillframeError:
        """The failure as the exception that it was on its own rank, to raise on another."""
        cls = getattr(errors, self.error, None)
        reason = self.reason
        if isinstance(cls, type) and issubclass(cls, StillframeError) and not issubclass(cls, SaveFailed):
            if step is None:
                return cls(f"rank {self.rank}: {reason}")
            cls, reason = SaveFailed, f"{cls.__name__}: {reason}"  # of a save, one wants to know step and path
        if not (isinstance(cls, type) and issubclass(cls, SaveFailed)):
            cls = SaveFailed
        return cls(reason, step=step, rank=self.rank, stage=self.stage, path=path)


def in_words(ranks: Sequence[int]) -> str:
    """Ranks for a message: "rank 3", "ranks 1, 3", or the first of many and how many more."""
    named = ", ".join(str(rank) for rank in ranks[:_MAX_NAMED_RANKS])
    more = f" and {len(ranks) - _MAX_NAMED_RANKS} more" if len(ranks) > _MAX_NAMED_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"
