"""All ranks act at one step boundary (`stillframe.commit.boundary`): the messages, through the job's store."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from stillframe.commit.boundary import STAGE, Chair, Decision, Message, Post, Seat
from stillframe.commit.failure import Failure
from stillframe.commit.rendezvous import Rendezvous

_log = logging.getLogger("stillframe")
_IDLE_S = 600.0
_GOODBYE_S = 10.0
_GOODBYE_AFTER_ERROR_S = 2.0
_MORE_THAN_RANK_0 = 1.5  # times what rank 0 waits for the others, they wait for it


class Together:
    """One rank's part in agreeing on one boundary, once. Every rank makes one, in the same order as the others.

    A thread of its own waits for messages, in calls that the store's server holds until there is one. `passes` is for
    the training thread. `on_called` hears, on that other thread, why the ranks were called. From the call to the
    decision it takes `timeout_s` at most, or twice that where rank 0 is silent.
    """

    def __init__(
        self, meeting: Rendezvous, *, path: Path, timeout_s: float, on_called: Callable[[str], None] = lambda _: None
    ) -> None:
        """Connects to the store. Raises SaveFailed."""
        self._rank = meeting.rank
        self._path = path
        self._timeout_s = timeout_s
        self._on_called = on_called
        self._seat = Seat(meeting.rank)
        self._chair = Chair(meeting.world_size) if meeting.rank == 0 else None
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._deadline: float | None = None
        self._over = False
        try:
            # The one is waited at for as long as the training goes on; where rank 0 is stopped meanwhile, so be it.
            self._inbox = meeting.store.another(answer_timeout_s=_IDLE_S)
            self._outbox = meeting.store.another(answer_timeout_s=min(_GOODBYE_S, timeout_s))
            # Counted per rank, in the store itself: it has the same number on all ranks.
            number = self._outbox.add(f"stillframe/{meeting.nonce}/boundaries-of-{self._rank}", 1)
        except ConnectionError as error:
            raise self._unreachable(error).exception(step=None, path=path) from error
        self._prefix = f"stillframe/{meeting.nonce}/boundary-{number}/to-"
        self._thread = threading.Thread(target=self._listen, name="stillframe-boundary", daemon=True)
        self._thread.start()

    def passes(self, step: int) -> bool:
        """The training is at the boundary after `step`: whether it is the one, or one after it.

        Returns at once while no rank has called; else when it is decided. Raises SaveTimeout or SaveFailed if it cannot
        be decided.
        """
        with self._changed:
            answer = self._seat.passes(step)
            if answer is None:
                self._changed.wait_for(lambda: self._seat.decision is not None, 2 * self._timeout_s)
                if self._seat.decision is None:
                    self._seat.settle(self._silent(2 * self._timeout_s))
                answer = self._seat.passes(step)
            decision = self._seat.decision
        if decision is not None and decision.failure is not None:
            raise decision.failure.exception(step=step, path=self._path)
        return bool(answer)

    def call(self, why: str) -> None:
        """Have all ranks agree; returns once rank 0 is asked. Of no effect after the first time on any rank."""
        with self._sending, suppress(ConnectionError):  # without rank 0 there is nobody to agree with
            self._tell(0, {"kind": "call", "why": f"{why} on rank {self._rank}"})

    def leave(self, error: BaseException | None) -> None:
        """This rank passes no boundary any more, and the others need not wait for it.

        Rank 0 waits, at most 10 s, until the others know what was decided, unless it leaves by an `error`.
        """
        failure = None
        if error is not None:
            reason = f"its training ended: {type(error).__name__}: {error}"
            failure = asdict(Failure(error="SaveFailed", rank=self._rank, stage=STAGE, reason=reason))
        with self._sending, suppress(ConnectionError):
            self._tell(0, {"kind": "left", "rank": self._rank, "failure": failure})
            if self._rank != 0:
                self._tell(self._rank, {"kind": "leaving"})
        # Not left behind without need: one that returns from a call of the store while the interpreter ends is fatal.
        self._thread.join(_GOODBYE_S if error is None else _GOODBYE_AFTER_ERROR_S)
        if self._thread.is_alive():
            _log.warning("rank %d left before all ranks knew whether they act at a common step", self._rank)
        self._over = True
        with self._sending:
            self._inbox.close()
            self._outbox.close()

    def _tell(self, rank: int, message: Message) -> None:
        self._outbox.push(f"{self._prefix}{rank}", json.dumps(message))

    # On the other thread

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
            failure = self._unreachable(error) if self._seat.called else None
            self._settle(Decision(beyond=None, failure=failure))

    def _hear(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "leaving":
            self._over = True
        elif kind in ("called", "decided"):
            with self._changed:
                answers = self._seat.told(message)
                self._changed.notify_all()
            self._send(answers)
            if kind == "called":
                self._deadline = time.monotonic() + self._patience_s
                self._on_called(message["why"])
            else:
                self._deadline = None
                self._over = self._chair is None
        else:
            assert self._chair is not None, "rank 0 is told, and nobody else"
            self._send(self._chair.told(message))
            self._over = self._chair.is_over

    def _expire(self) -> None:
        self._deadline = None
        if self._chair is None:
            self._settle(self._silent(self._patience_s))
        else:
            self._send(self._chair.expired(self._patience_s))

    def _settle(self, decision: Decision) -> None:
        with self._changed:
            self._seat.settle(decision)
            self._changed.notify_all()

    def _send(self, post: Post) -> None:
        for rank, message in post:
            self._inbox.push(f"{self._prefix}{rank}", json.dumps(message))
        if self._chair is not None and post:
            # A push has no answer. After a question on the same connection it has arrived, should this process end now.
            self._inbox.has(f"{self._prefix}{self._rank}")

    @property
    def _patience_s(self) -> float:
        return self._timeout_s if self._chair is not None else self._timeout_s * _MORE_THAN_RANK_0

    def _silent(self, waited_s: float) -> Decision:
        reason = f"rank 0 did not say within {waited_s:.3g} s at which step all ranks act; is it stopped?"
        return Decision(beyond=None, failure=Failure(error="SaveTimeout", rank=0, stage=STAGE, reason=reason))

    def _unreachable(self, error: ConnectionError) -> Failure:
        reason = f"rank 0's process, which holds the ranks' store, cannot be reached: {error}"
        return Failure(error="SaveFailed", rank=0, stage=STAGE, reason=reason)
