"""The vote on one attempt: every rank says whether its share is on disk, rank 0 decides, everyone learns the verdict.

Keys in the store carry the attempt, so nothing left from another attempt can be taken for this one. Every wait is
bounded, and one that ends without an answer names the ranks that were waited for. Messages are JSON: no code travels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stillframe.commit.failure import Failure, in_words
from stillframe.commit.rendezvous import Rendezvous
from stillframe.errors import SaveFailed, SaveTimeout
from stillframe.records import Recovered
from stillframe.sketch import Sketch

_FAILURE_GRACE_S = 60.0
_LONGEST_DECISION_S = 60.0
_SHORTEST_DECISION_S = 5.0
_MAX_REASONS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One rank's word on an attempt. `failure` is None when its share is written, fsynced and receipted.

    `sketch` has the digits of its layout's, at the start and where its layout is known to be another than rank 0's.
    """

    rank: int
    step: int | None
    layout_digest: str
    failure: Failure | None
    sketch: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aftermath:
    """What rank 0 did after publishing: `trouble` if that failed (the checkpoint is published all the same).

    `steps` are the published steps after retention, of every kind.
    `recovered` is what the start did with what ended jobs had left.
    """

    trouble: Failure | None
    steps: Mapping[str, tuple[int, ...]]
    recovered: tuple[Recovered, ...] = ()


class Ballot:
    """The vote on one attempt, as one rank takes part in it.

    Attempts are numbered on each rank alike: `successor` makes the next one's. `step` None: not a save, but the start
    of the Checkpointers, attempt 0.
    """

    def __init__(self, meeting: Rendezvous, *, step: int | None, path: Path, timeout_s: float, number: int = 0) -> None:
        self._meeting = meeting
        self._step = step
        self._path = path
        self._timeout_s = timeout_s
        self._number = number
        self._opened = False
        self._expected_acknowledgements = meeting.world_size

    @property
    def attempt(self) -> str:
        """What names the attempt in keys, files and the manifest; known for good once it is open."""
        return f"{self._meeting.nonce}.{self._number}"

    def successor(self, *, step: int | None, path: Path) -> Ballot:
        """The ballot of the next attempt. One that rank 0 never opened does not count."""
        number = self._number + 1 if self._opened or self._meeting.rank == 0 else self._number
        return Ballot(self._meeting, step=step, path=path, timeout_s=self._timeout_s, number=number)

    def open(self, failure: Failure | None, *, layout_digest: str | None = None, note: str | None = None) -> None:
        """Rank 0: the directory is ready for the writers, who must have this layout; or it will never be.

        `note` is what rank 0 has to say besides, to every rank.
        """
        self._opened = True
        told = None if failure is None else asdict(failure)
        self._set("open", {"step": self._step, "layout_digest": layout_digest, "failure": told, "note": note})

    def await_open(self, *, layout_digest: str | None = None, sketch: Sketch | None = None) -> str | None:
        """Block until rank 0 opened the attempt, and return its note. `layout_digest` is that of this rank, None if it
        has none to compare.

        Raises SaveFailed with rank 0's reason if it could not, or if rank 0 saves another step or layout than this
        rank: nothing may be written then, and the attempt fails on all ranks.
        """
        answer = self._get("open", self._timeout_s, "to create the directory")
        while answer["step"] != self._step and (answer["failure"] is not None or self._is_decided()):
            # A save that this rank did not call, and that is over without it. The next one may be ours.
            self._number += 1
            answer = self._get("open", self._timeout_s, "to create the directory")
        self._opened = True
        if answer["failure"] is not None:
            raise Failure(**answer["failure"]).exception(step=self._step, path=self._path)
        required_digest = answer["layout_digest"] or ""
        own_digest = required_digest if layout_digest is None else layout_digest
        digits = "" if sketch is None or own_digest == required_digest else sketch.digits
        own = Vote(rank=self._meeting.rank, step=self._step, layout_digest=own_digest, failure=None, sketch=digits)
        reason = _disagreement(own, step=answer["step"], layout_digest=required_digest)
        if reason is not None:
            failure = Failure(error="SaveFailed", rank=own.rank, stage="vote", reason=reason)
            self.cast(replace(own, failure=failure))
            raise failure.exception(step=self._step, path=self._path)
        note: str | None = answer["note"]
        return note

    def cast(self, vote: Vote) -> None:
        with self._reaching_rank_0():
            self._meeting.store.push(self._key("votes"), json.dumps(asdict(vote)))

    def collect(self, sketch: Sketch | None = None) -> tuple[Vote, ...]:
        """Rank 0: all votes, by rank. Blocks at most for the timeout, and a minute once one rank has failed.

        Raises SaveTimeout naming the ranks that did not vote, or the failures of those that did; SaveFailed if ranks
        disagree on the step or the layout. `sketch` is that of rank 0's layout: with it, the first tensor is named that
        a rank describes differently.
        """
        votes: dict[int, Vote] = {}
        deadline = time.monotonic() + self._timeout_s
        while len(votes) < self._meeting.world_size:
            try:
                fields = json.loads(self._meeting.store.pop(self._key("votes"), deadline - time.monotonic()))
            except TimeoutError:
                break
            failure = fields.pop("failure")
            vote = Vote(**fields, failure=None if failure is None else Failure(**failure))
            votes[vote.rank] = vote
            if vote.failure is not None:
                deadline = min(deadline, time.monotonic() + _FAILURE_GRACE_S)
        # Those that are late may never come, and whoever leaves the store must not wait for them.
        self._expected_acknowledgements = len(votes)
        self._raise_failures(votes, sketch)
        self._raise_disagreements(votes, sketch)
        return tuple(votes[rank] for rank in sorted(votes))

    def decide(self, failure: Failure | None) -> None:
        """Rank 0: it is published (None), or will never be."""
        self._set("verdict", None if failure is None else asdict(failure))

    def await_verdict(self) -> None:
        """Block until rank 0 decided. Raises the failure if it is not published, SaveTimeout if there is no verdict."""
        # Rank 0 may write for as long as is allowed, then wait for votes as long, before it proves and publishes.
        answer = self._get("verdict", 2 * self._timeout_s + self._decision_s, "to decide", " (it may be published)")
        if answer is not None:
            raise Failure(**answer).exception(step=self._step, path=self._path)

    def conclude(self, aftermath: Aftermath) -> None:
        """Rank 0, after a verdict without failure: the last word on this attempt."""
        recovered = [asdict(directory) | {"path": str(directory.path)} for directory in aftermath.recovered]
        self._set("aftermath", asdict(aftermath) | {"recovered": recovered})

    def await_aftermath(self) -> Aftermath:
        """Block until rank 0 is done with the attempt."""
        fields = self._get("aftermath", self._timeout_s + self._decision_s, "to remove what is superseded")
        trouble = None if fields["trouble"] is None else Failure(**fields["trouble"])
        steps = {kind: tuple(published) for kind, published in fields["steps"].items()}
        recovered = tuple(Recovered(**entry | {"path": Path(entry["path"])}) for entry in fields["recovered"])
        return Aftermath(trouble=trouble, steps=steps, recovered=recovered)

    def acknowledge(self) -> None:
        """This rank has heard all that it waits for and needs the store no more for this attempt."""
        # Only a rank 0 that waits to leave wants to know; one that is gone does not, and that is no failure.
        with suppress(ConnectionError):
            self._meeting.store.add(self._key("seen"), 1)

    def await_acknowledged(self, timeout_s: float) -> bool:
        """Rank 0, before it closes the store: wait until the ranks that voted have acknowledged (where no votes were
        collected: all ranks). False if some did not."""
        deadline = time.monotonic() + timeout_s
        while self._meeting.store.add(self._key("seen"), 0) < self._expected_acknowledgements:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def forget(self) -> None:
        """Rank 0: drop the attempt's keys. Safe once all ranks have voted on a later attempt."""
        for name in ("open", "verdict", "aftermath", "seen"):
            self._meeting.store.delete(self._key(name))

    def _key(self, name: str) -> str:
        return f"stillframe/{self.attempt}/{name}"

    @property
    def _decision_s(self) -> float:
        """How long rank 0 may take from the last vote to the verdict."""
        return min(_LONGEST_DECISION_S, max(_SHORTEST_DECISION_S, self._timeout_s))

    def _is_decided(self) -> bool:
        with self._reaching_rank_0():
            return self._meeting.store.has(self._key("verdict"))

    def _set(self, name: str, message: Any) -> None:
        with self._reaching_rank_0():
            self._meeting.store.set(self._key(name), json.dumps(message))

    def _get(self, name: str, timeout_s: float, purpose: str, remark: str = "") -> Any:
        with self._reaching_rank_0(remark):
            try:
                return json.loads(self._meeting.store.get(self._key(name), timeout_s))
            except TimeoutError as error:
                raise SaveTimeout(
                    f"rank {self._meeting.rank} waited {timeout_s:.0f} s for rank 0 {purpose}{remark}",
                    step=self._step,
                    rank=0,
                    stage="vote",
                    path=self._path,
                ) from error

    @contextmanager
    def _reaching_rank_0(self, remark: str = "") -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            reason = f"rank 0's process, which holds the store, cannot be reached: {error}{remark}"
            raise SaveFailed(reason, step=self._step, rank=0, stage="vote", path=self._path) from error

    def _raise_failures(self, votes: dict[int, Vote], sketch: Sketch | None) -> None:
        failures = [
            replace(vote.failure, reason=vote.failure.reason + _difference(vote, self._step, sketch))
            for _, vote in sorted(votes.items())
            if vote.failure is not None
        ]
        late = [rank for rank in range(self._meeting.world_size) if rank not in votes]
        if failures:
            reason = failures[0].reason
            if len(failures) > 1 or late:
                reasons = [f"rank {f.rank} in stage {f.stage!r}: {f.reason}" for f in failures[:_MAX_REASONS]]
                if len(failures) > _MAX_REASONS:
                    reasons.append(f"also {in_words([f.rank for f in failures[_MAX_REASONS:] if f.rank is not None])}")
                if late:
                    reasons.append(f"no word from {in_words(late)}")
                reason = "; ".join(reasons)
            first = failures[0]
            failure = Failure(error=first.error, rank=first.rank, stage=first.stage, reason=reason)
            raise failure.exception(step=self._step, path=self._path)
        if late:
            is_resume = self._step is None and self._number > 0  # without a step, attempt 0 is the start
            called, stage = ("resume", "resume") if is_resume else ("the save", "vote")
            raise SaveTimeout(
                f"{in_words(late)} did not report within {self._timeout_s:.0f} s (of {self._meeting.world_size} "
                f"ranks); did every rank call {called}?",
                step=self._step,
                rank=late[0],
                stage=stage,
                path=self._path,
            )

    def _raise_disagreements(self, votes: dict[int, Vote], sketch: Sketch | None) -> None:
        own = votes[self._meeting.rank]
        for rank, vote in sorted(votes.items()):
            reason = _disagreement(vote, step=own.step, layout_digest=own.layout_digest)
            if reason is not None:
                reason += _difference(vote, self._step, sketch)
                raise SaveFailed(reason, step=self._step, rank=rank, stage="vote", path=self._path)


def _disagreement(vote: Vote, *, step: int | None, layout_digest: str) -> str | None:
    """What keeps `vote` from being one on rank 0's save, of `step` and `layout_digest`."""
    if vote.step != step:
        return (
            f"rank {vote.rank} saves step {vote.step} while rank 0 saves step {step}; every rank must call every save"
        )
    if vote.layout_digest != layout_digest:
        return f"rank {vote.rank} has another layout than rank 0: do all ranks have the same model and options?"
    return None


def _difference(vote: Vote, step: int | None, sketch: Sketch | None) -> str:
    """What there is to add to a disagreement: where the layout of `vote` differs from rank 0's, with `sketch`.

    Of different steps, nothing: they may be saves of different kinds.
    """
    if vote.step != step:
        return ""
    difference = sketch.first_difference(vote.sketch) if sketch is not None and vote.sketch else None
    if difference is None:
        return ""
    stages = "" if step is not None else ". Ranks that have the stages of a pipeline: pass pipeline=True"
    return f" The first tensor that they describe differently: {difference}{stages}"
