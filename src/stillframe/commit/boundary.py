"""A step boundary that all ranks agree on while they train: the next one that none of them has passed.

Each rank has a queue of messages. A rank that wants to stop calls rank 0, and rank 0 calls all. A rank that is called
marks that its training passes no further boundary unasked, and then answers with the last one that it has passed. The
answer waits for nothing, whatever the training thread does. Rank 0 tells all ranks the largest answer; the first
boundary beyond it is the one. No rank has passed it, for none passes any between its answer and that word. And none is
held up for good: the word follows from the answers alone.

    to rank 0           call {why}; passed {rank, step}; heard {rank}; left {rank, failure}
    from rank 0         called {why}; decided {beyond, failure}

Here are the rules alone, with neither clock nor store; `stillframe.commit.together` has these.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from stillframe.commit.failure import Failure, in_words

STAGE = "preemption"

Message = dict[str, Any]
Post = list[tuple[int, Message]]
"""Messages, each with the rank that it is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The first boundary after step `beyond` is the one. None: there is none, since a rank has ended its training.

    With a `failure`: the ranks could not agree.
    """

    beyond: int | None
    failure: Failure | None = None


class Seat:
    """One rank's part: where its training is, and what it was told."""

    def __init__(self, rank: int) -> None:
        self.called = False
        self.decision: Decision | None = None
        self._rank = rank
        self._passed = 0

    def passes(self, step: int) -> bool | None:
        """The training is at the boundary after `step`: whether it is the one, or one after it; None: to be decided."""
        self._passed = step
        if self.decision is not None:
            return self.decision.beyond is not None and step > self.decision.beyond
        return None if self.called else False

    def told(self, message: Message) -> Post:
        if message["kind"] == "called":
            self.called = True
            return [(0, {"kind": "passed", "rank": self._rank, "step": self._passed})]
        failure = message["failure"]
        self.settle(Decision(beyond=message["beyond"], failure=None if failure is None else Failure(**failure)))
        return [(0, {"kind": "heard", "rank": self._rank})]

    def settle(self, decision: Decision) -> None:
        """The first decision stays."""
        self.decision = self.decision or decision


class Chair:
    """Rank 0's part beside its seat: who said what, and what follows."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._called = False
        self._decided = False
        self._passed: dict[int, int] = {}
        self._heard: set[int] = set()
        self._gone: set[int] = set()
        self._left_by_error = False

    @property
    def is_over(self) -> bool:
        """Whether rank 0 has left, and nobody waits for its word any more; after an error, nobody is waited for."""
        return 0 in self._gone and (self._left_by_error or len(self._heard | self._gone) == self._world_size)

    def told(self, message: Message) -> Post:
        kind = message["kind"]
        if kind == "heard":
            self._heard.add(message["rank"])
            return []
        failure = None
        called: Post = []
        if kind == "call" and not self._called:
            self._called = True
            called = [] if self._decided else self._to_all({"kind": "called", "why": message["why"]})
        elif kind == "passed":
            self._passed[message["rank"]] = message["step"]
        elif kind == "left":
            self._gone.add(message["rank"])
            failure = message["failure"]
            if message["rank"] == 0:
                self._left_by_error = failure is not None
        return called + self._follow(failure)

    def expired(self, timeout_s: float) -> Post:
        """There is no more time to wait for answers."""
        late = [rank for rank in range(self._world_size) if rank not in self._passed and rank not in self._gone]
        if self._decided or not late:
            return []
        reason = (
            f"{in_words(late)} did not say within {timeout_s:.3g} s how far the training is (of {self._world_size} "
            "ranks); dead, stopped, or not inside of a Preemption?"
        )
        post = self._decide(failure=asdict(Failure(error="SaveTimeout", rank=late[0], stage=STAGE, reason=reason)))
        self._gone.update(late)  # told, should they yet listen, but not waited for
        return post

    def _follow(self, failure: Message | None) -> Post:
        """What follows from all that was said. Rank 0's end is the last chance to tell the others anything."""
        if self._decided or not (self._called or 0 in self._gone):
            return []
        if self._gone:
            return self._decide(failure=failure if self._called else None)
        if len(self._passed) == self._world_size:
            return self._decide(beyond=max(self._passed.values()))
        return []

    def _decide(self, *, beyond: int | None = None, failure: Message | None = None) -> Post:
        self._decided = True
        return self._to_all({"kind": "decided", "beyond": beyond, "failure": failure})

    def _to_all(self, message: Message) -> Post:
        return [(rank, message) for rank in range(self._world_size) if rank not in self._gone]
