"""A step boundary that all ranks agree on while they train: the next one that none of them has passed.

Each rank has a queue in the job's store, and a thread that waits for messages there. A rank that wants to stop calls
rank 0, and rank 0 calls all. A rank that is called marks that its training passes no further boundary unasked, and then
answers with the last one that it has passed. The answer waits for nothing, whatever the training thread does. Rank 0
tells all ranks the largest answer; the first boundary beyond it is the one. No rank has passed it, for none passes any
between its answer and that word. And none is held up for good: the word follows from the answers alone.

    to rank 0           call {why}; passed {rank, step}; left {rank, failure}; heard {rank}
    from rank 0         called {why}; decided {beyond, failure}
    to oneself          leaving {failure}
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillframe.commit.failure import Failure, in_words
from stillframe.commit.rendezvous import Rendezvous

_log = logging.getLogger("stillframe")
_STAGE = "preemption"
_IDLE_S = 600.0
_GOODBYE_S = 10.0
_GOODBYE_AFTER_ERROR_S = 2.0
_MORE_THAN_RANK_0 = 1.5  # times what rank 0 waits for the others, they wait for it

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The first boundary after step `beyond` is the one. None: there will be none, since a rank has ended its training.

    With a `failure`: the ranks could not agree.
    """

    beyond: int | None
    failure: Failure | None = None


class Chair:
    """Rank 0's part: who said what, and what follows. No clock and no store: `said` takes each message that comes, and
    `expired` the end of all patience; they return the messages to send, each with its receiver."""

    def __init__(self, world_size: int) -> None:
        self.decision: Decision | None = None
        self.called = False
        self._world_size = world_size
        self._passed: dict[int, int] = {}
        self._gone: set[int] = set()
        self._heard: set[int] = set()
        self._left_by_error = False

    @property
    def is_over(self) -> bool:
        """Whether rank 0 has left, and nobody waits for its word any more; after an error, nobody is waited for."""
        return 0 in self._gone and (self._left_by_error or len(self._heard | self._gone) == self._world_size)

    def said(self, message: Message) -> list[tuple[int, Message]]:
        kind = message["kind"]
        if kind == "call" and not self.called and self.decision is None:
            self.called = True
            called = self._tell_all({"kind": "called", "why": message["why"]})
            return called + self._follow()
        if kind == "passed":
            self._passed[message["rank"]] = message["step"]
            return self._follow()
        if kind == "left":
            self._gone.add(message["rank"])
            if message["rank"] != 0:
                return self._follow(message["failure"])
            self._left_by_error = message["failure"] is not None
            if self.decision is None:  # whoever waits for a word of rank 0 gets it now
                return self._decide(message["failure"] if self.called else None)
        if kind == "heard":
            self._heard.add(message["rank"])
        return []

    def expired(self, timeout_s: float) -> list[tuple[int, Message]]:
        """There is no more time to wait for answers."""
        late = [rank for rank in range(self._world_size) if rank not in self._passed and rank not in self._gone]
        reason = (
            f"{in_words(late)} did not say within {timeout_s:.3g} s how far the training is (of {self._world_size} "
            "ranks); dead, stopped, or not yet inside of Preemption?"
        )
        return self._decide(asdict(Failure(error="SaveTimeout", rank=late[0], stage=_STAGE, reason=reason)))

    def _follow(self, failure: dict[str, Any] | None = None) -> list[tuple[int, Message]]:
        if not self.called or self.decision is not None:
            return []
        if self._gone or failure is not None:
            return self._decide(failure)
        if len(self._passed) == self._world_size:
            return self._decide(None, beyond=max(self._passed.values()))
        return []

    def _decide(self, failure: dict[str, Any] | None, *, beyond: int | None = None) -> list[tuple[int, Message]]:
        self.decision = Decision(beyond=beyond, failure=None if failure is None else Failure(**failure))
        return self._tell_all({"kind": "decided", "beyond": beyond, "failure": failure})

    def _tell_all(self, message: Message) -> list[tuple[int, Message]]:
        return [(rank, message) for rank in range(self._world_size) if rank not in self._gone]


class Boundary:
    """One rank's part in agreeing on one boundary, once. Every rank makes one, in the same order as the others.

    `passes` is for the training thread. `on_called` hears, on another thread, why the ranks were called. From the call
    to the decision it takes `timeout_s` at most, unless rank 0 is silent: then about twice that.
    """

    def __init__(
        self, meeting: Rendezvous, *, path: Path, timeout_s: float, on_called: Callable[[str], None] = lambda _: None
    ) -> None:
        """Connects to the store. Raises SaveFailed."""
        self._rank = meeting.rank
        self._path = path
        self._timeout_s = timeout_s
        self._on_called = on_called
        self._sending = threading.Lock()
        try:
            # The one is waited at for as long as the training goes on; where rank 0 is stopped meanwhile, so be it.
            self._inbox = meeting.store.another(answer_timeout_s=_IDLE_S)
            self._outbox = meeting.store.another(answer_timeout_s=min(_GOODBYE_S, timeout_s))
            # Counted per rank, in the store itself: the same boundary has the same number on all ranks.
            number = self._outbox.add(f"stillframe/{meeting.nonce}/boundaries-of-{self._rank}", 1)
        except ConnectionError as error:
            failure = self._silent(f"its process, which holds the store, cannot be reached: {error}")
            raise failure.exception(step=None, path=path) from error
        self._prefix = f"stillframe/{meeting.nonce}/boundary-{number}/to-"
        self._chair = Chair(meeting.world_size) if meeting.rank == 0 else None
        self._changed = threading.Condition()
        self._passed = 0
        self._is_called = False
        self._decision: Decision | None = None
        self._deadline: float | None = None
        self._over = False
        self._thread = threading.Thread(target=self._listen, name="stillframe-boundary", daemon=True)
        self._thread.start()

    def passes(self, step: int) -> bool:
        """The training thread is at the boundary after `step`: whether it is the one, or one after it.

        Returns at once while no rank has called; else when it is decided. Raises SaveTimeout or SaveFailed if it cannot
        be decided.
        """
        with self._changed:
            self._passed = step
            if not self._is_called:
                return False
            self._changed.wait_for(lambda: self._decision is not None, 2 * self._timeout_s)
            failure = self._silent(f"there was no word within {2 * self._timeout_s:.3g} s")
            decision = self._decision or Decision(beyond=None, failure=failure)
        if decision.failure is not None:
            raise decision.failure.exception(step=step, path=self._path)
        return decision.beyond is not None and step > decision.beyond

    def call(self, why: str) -> None:
        """Have all ranks agree; returns once rank 0 is asked. Of no effect after the first time on any rank."""
        with self._sending, suppress(ConnectionError):  # without rank 0 there is nobody to agree with
            self._outbox.push(f"{self._prefix}0", json.dumps({"kind": "call", "why": f"{why} on rank {self._rank}"}))

    def leave(self, error: BaseException | None) -> None:
        """This rank passes no boundary any more. The others need not wait for it.

        Rank 0 waits, at most 10 s, until the others know what was decided, unless it leaves by an `error`.
        """
        failure = None
        if error is not None:
            reason = f"its training ended: {type(error).__name__}: {error}"
            failure = asdict(Failure(error="SaveFailed", rank=self._rank, stage=_STAGE, reason=reason))
        left = json.dumps({"kind": "left", "rank": self._rank, "failure": failure})
        with self._sending, suppress(ConnectionError):
            self._outbox.push(f"{self._prefix}0", left)
            if self._rank != 0:
                self._outbox.push(f"{self._prefix}{self._rank}", json.dumps({"kind": "leaving"}))
        # Not left behind without need: one that returns from a call of the store while the interpreter ends is fatal.
        self._thread.join(_GOODBYE_S if error is None else _GOODBYE_AFTER_ERROR_S)
        if self._thread.is_alive():
            _log.warning("rank %d left before all ranks knew whether they act at a common step", self._rank)
        self._over = True
        self._inbox.close()
        self._outbox.close()

    # The thread

    def _listen(self) -> None:
        try:
            while not self._over:
                wait_s = _IDLE_S if self._deadline is None else self._deadline - time.monotonic()
                try:
                    message = json.loads(self._inbox.pop(f"{self._prefix}{self._rank}", wait_s))
                except TimeoutError:
                    if self._deadline is not None:
                        self._expire()
                else:
                    self._hear(message)
        except ConnectionError as error:
            with self._changed:
                failure = self._silent(f"its process, which holds the store, cannot be reached: {error}")
                self._settle(Decision(beyond=None, failure=failure if self._is_called else None))

    def _hear(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "called":
            # Before the answer, so that no boundary is passed that the answer does not have.
            with self._changed:
                self._is_called = True
                passed = self._passed
            self._deadline = time.monotonic() + self._timeout_s * (1 if self._chair else _MORE_THAN_RANK_0)
            self._send([(0, {"kind": "passed", "rank": self._rank, "step": passed})])
            self._on_called(message["why"])
        elif kind == "decided":
            self._deadline = None
            failure = message["failure"]
            self._settle(Decision(beyond=message["beyond"], failure=None if failure is None else Failure(**failure)))
            self._send([(0, {"kind": "heard", "rank": self._rank})])
            self._over = self._chair is None
        elif kind == "leaving":
            self._over = True
        else:
            assert self._chair is not None, "only rank 0 is told"
            self._send(self._chair.said(message))
            self._over = self._chair.is_over

    def _expire(self) -> None:
        self._deadline = None
        if self._chair is None:
            failure = self._silent(f"it did not say within {self._timeout_s * _MORE_THAN_RANK_0:.3g} s at which step")
            self._settle(Decision(beyond=None, failure=failure))
        elif self._chair.decision is None:
            self._send(self._chair.expired(self._timeout_s))

    def _settle(self, decision: Decision) -> None:
        with self._changed:
            self._decision = self._decision or decision
            self._changed.notify_all()

    def _silent(self, what: str) -> Failure:
        return Failure(error="SaveTimeout", rank=0, stage=_STAGE, reason=f"the ranks agree through rank 0, and {what}")

    def _send(self, messages: Sequence[tuple[int, Message]]) -> None:
        for receiver, message in messages:
            self._inbox.push(f"{self._prefix}{receiver}", json.dumps(message))
