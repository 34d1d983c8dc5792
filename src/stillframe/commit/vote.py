"""The vote on one attempt: every rank says whether its share is on disk, rank 0 decides, everyone learns the verdict.

Keys in the store carry the attempt, so nothing left from another attempt can be taken for this one. Every wait is
bounded, and one that ends without an answer names the ranks that were waited for. Messages are JSON: no code travels.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stillframe import errors
from stillframe.commit.rendezvous import Rendezvous
from stillframe.errors import SaveFailed, SaveTimeout, StillframeError

_FAILURE_GRACE_S = 60.0
_VERDICT_SLACK_S = 60.0
_MAX_NAMED_RANKS = 16


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
            return Failure(error=type(error).__name__, rank=rank, stage=stage, reason=str(error))
        return Failure(error="SaveFailed", rank=rank, stage=stage, reason=f"{type(error).__name__}: {error}")

    def exception(self, *, step: int | None, path: Path) -> StillframeError:
        """The failure as the exception that it was on its own rank, to raise on another."""
        cls = getattr(errors, self.error, None)
        if isinstance(cls, type) and issubclass(cls, StillframeError) and not issubclass(cls, SaveFailed):
            return cls(f"rank {self.rank}: {self.reason}")
        if not (isinstance(cls, type) and issubclass(cls, SaveFailed)):
            cls = SaveFailed
        return cls(self.reason, step=step, rank=self.rank, stage=self.stage, path=path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One rank's word on an attempt. `failure` is None when its share is written, fsynced and receipted."""

    rank: int
    step: int | None
    layout_digest: str
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Aftermath:
    """What rank 0 did after publishing: `trouble` if that failed (the checkpoint is published all the same).

    `steps` are the published steps of the kind, after retention.
    """

    trouble: Failure | None
    steps: tuple[int, ...]


class Ballot:
    """The vote on one attempt, as one rank takes part in it. All ranks make theirs in the same order of attempts.

    `step` None: not a save, but the start of the Checkpointers.
    """

    def __init__(self, meeting: Rendezvous, *, attempt: str, step: int | None, path: Path, timeout_s: float) -> None:
        self._meeting = meeting
        self.attempt = attempt
        self._step = step
        self._path = path
        self._timeout_s = timeout_s

    def open(self, failure: Failure | None) -> None:
        """Rank 0: the directory is ready for the writers, or will never be."""
        self._set("open", None if failure is None else asdict(failure))

    def await_open(self) -> None:
        """Block until rank 0 opened the attempt. Raises SaveFailed with its reason if it could not."""
        answer = self._get("open", self._timeout_s, "to create the directory")
        if answer is not None:
            raise Failure(**answer).exception(step=self._step, path=self._path)

    def cast(self, vote: Vote) -> None:
        with self._reaching_rank_0():
            self._meeting.store.queue_push(self._key("votes"), json.dumps(asdict(vote)))

    def collect(self) -> tuple[Vote, ...]:
        """Rank 0: all votes, by rank. Blocks at most for the timeout, and a minute once one rank has failed.

        Raises SaveTimeout naming the ranks that did not vote, or the failures of those that did; SaveFailed if ranks
        disagree on the step or the layout.
        """
        votes: dict[int, Vote] = {}
        deadline = time.monotonic() + self._timeout_s
        while len(votes) < self._meeting.world_size:
            self._meeting.store.set_timeout(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
            try:
                fields = json.loads(self._meeting.store.queue_pop(self._key("votes")))
            except dist.DistStoreError:
                break
            failure = fields.pop("failure")
            vote = Vote(**fields, failure=None if failure is None else Failure(**failure))
            votes[vote.rank] = vote
            if vote.failure is not None:
                deadline = min(deadline, time.monotonic() + _FAILURE_GRACE_S)
        self._raise_failures(votes)
        self._raise_disagreements(votes)
        return tuple(votes[rank] for rank in sorted(votes))

    def decide(self, failure: Failure | None) -> None:
        """Rank 0: it is published (None), or will never be."""
        self._set("verdict", None if failure is None else asdict(failure))

    def await_verdict(self) -> None:
        """Block until rank 0 decided. Raises the failure if it is not published, SaveTimeout if there is no verdict."""
        answer = self._get("verdict", self._timeout_s + _VERDICT_SLACK_S, "to decide")
        if answer is not None:
            raise Failure(**answer).exception(step=self._step, path=self._path)

    def conclude(self, aftermath: Aftermath) -> None:
        """Rank 0, after a verdict without failure: the last word on this attempt."""
        self._set("aftermath", asdict(aftermath))

    def await_aftermath(self) -> Aftermath:
        """Block until rank 0 is done with the attempt."""
        fields = self._get("aftermath", self._timeout_s + _VERDICT_SLACK_S, "to remove what is superseded")
        trouble = None if fields["trouble"] is None else Failure(**fields["trouble"])
        return Aftermath(trouble=trouble, steps=tuple(fields["steps"]))

    def acknowledge(self) -> None:
        """This rank has heard all that it waits for and needs the store no more for this attempt."""
        with self._reaching_rank_0():
            self._meeting.store.add(self._key("seen"), 1)

    def await_acknowledged(self, timeout_s: float) -> bool:
        """Rank 0, before it closes the store: wait until every rank has acknowledged. False if some did not."""
        deadline = time.monotonic() + timeout_s
        while self._meeting.store.add(self._key("seen"), 0) < self._meeting.world_size:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def forget(self) -> None:
        """Rank 0: drop the attempt's keys. Safe once all ranks have voted on a later attempt."""
        for name in ("open", "verdict", "aftermath", "seen"):
            self._meeting.store.delete_key(self._key(name))

    def _key(self, name: str) -> str:
        return f"stillframe/{self.attempt}/{name}"

    def _set(self, name: str, message: Any) -> None:
        with self._reaching_rank_0():
            self._meeting.store.set(self._key(name), json.dumps(message))

    def _get(self, name: str, timeout_s: float, purpose: str) -> Any:
        key = self._key(name)
        with self._reaching_rank_0():
            try:
                self._meeting.store.wait([key], timedelta(seconds=timeout_s))
            except dist.DistStoreError as error:
                raise SaveTimeout(
                    f"rank {self._meeting.rank} waited {timeout_s:.0f} s for rank 0 {purpose}",
                    step=self._step,
                    rank=0,
                    stage="vote",
                    path=self._path,
                ) from error
            return json.loads(self._meeting.store.get(key))

    def _reaching_rank_0(self) -> _ReachingRank0:
        return _ReachingRank0(self._step, self._path)

    def _raise_failures(self, votes: dict[int, Vote]) -> None:
        failed = [vote for _, vote in sorted(votes.items()) if vote.failure is not None]
        late = [rank for rank in range(self._meeting.world_size) if rank not in votes]
        reasons = [f"rank {v.rank} in stage {v.failure.stage!r}: {v.failure.reason}" for v in failed if v.failure]
        if late:
            reasons.append(f"no word from {_ranks(late)}")
        if failed:
            first = failed[0].failure
            assert first is not None, "selected for having one"
            reason = first.reason if len(reasons) == 1 else "; ".join(reasons[:_MAX_NAMED_RANKS])
            raise Failure(error=first.error, rank=first.rank, stage=first.stage, reason=reason).exception(
                step=self._step, path=self._path
            )
        if late:
            raise SaveTimeout(
                f"{_ranks(late)} did not report within {self._timeout_s:.0f} s (of {self._meeting.world_size} ranks); "
                "did every rank call the save?",
                step=self._step,
                rank=late[0],
                stage="vote",
                path=self._path,
            )

    def _raise_disagreements(self, votes: dict[int, Vote]) -> None:
        own = votes[self._meeting.rank]
        for rank, vote in sorted(votes.items()):
            if vote.step != own.step:
                reason = f"rank {rank} saves step {vote.step} while rank {own.rank} saves step {own.step}"
            elif vote.layout_digest != own.layout_digest:
                reason = f"rank {rank} has another layout than rank {own.rank}: do the ranks hold the same model?"
            else:
                continue
            raise SaveFailed(reason, step=self._step, rank=rank, stage="vote", path=self._path)


class _ReachingRank0:
    """Turns a broken connection to rank 0's store into a SaveFailed that says so."""

    def __init__(self, step: int | None, path: Path) -> None:
        self._step = step
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, dist.DistNetworkError):
            raise SaveFailed(
                f"rank 0's process, which holds the store, cannot be reached ({error})",
                step=self._step,
                rank=0,
                stage="vote",
                path=self._path,
            ) from error


def _ranks(ranks: list[int]) -> str:
    named = ", ".join(str(rank) for rank in ranks[:_MAX_NAMED_RANKS])
    more = f" and {len(ranks) - _MAX_NAMED_RANKS} more" if len(ranks) > _MAX_NAMED_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"
