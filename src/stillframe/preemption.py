"""Preemption: a training that is told to end saves at the next step boundary, on all ranks alike, and ends in time."""

from __future__ import annotations

import signal
from collections.abc import Collection
from types import TracebackType
from typing import ClassVar, Self

from stillframe.checkpointer import Checkpointer
from stillframe.commit.together import Together
from stillframe.errors import OptionError
from stillframe.notice import BUDGET_S, PREEMPTED_STATUS, SIGNALS, Notice

# Of the budget, what the ranks may take to agree; most of it belongs to the save.
_AGREEMENT_SHARE = 1 / 4


class Preemption:
    """Has all ranks save and end at one and the same step, once any of them gets SIGTERM or SIGUSR1.

        with stillframe.Preemption(ckpt) as preemption:
            for step in range(first, total_steps + 1):
                train_one_step()
                if preemption.due(step):
                    ckpt.async_save(step)
                    break
        ckpt.close()
        sys.exit(preemption.STATUS if preemption.was_due else 0)

    Every rank makes one of its Checkpointer, enters it on the main thread, and calls `due` for the same steps. Handlers
    that others have set for the signals are called too, and put back on leaving. Works without torch.distributed too.

    Args:
        checkpointer: whose ranks they are; to be closed after this is left.
        signals: what to take for a preemption.
        budget_s: from the signal to having left the context, in seconds (of other ranks: from when they learn of it).
            A process that has not left by then logs how far its save is and ends by `os._exit` with `STATUS`, as it
            does at once by a second signal on this rank, 5 s after the first or later. Choose less than the sender
            waits before SIGKILL.

    Raises OptionError; on entering, SaveFailed if rank 0, which holds the ranks' store, cannot be reached.
    """

    STATUS: ClassVar[int] = PREEMPTED_STATUS
    """143: what a preempted process should end with; not 0, for it is not done, and is to be started again."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        *,
        signals: Collection[signal.Signals] = SIGNALS,
        budget_s: float = BUDGET_S,
    ) -> None:
        if not signals:
            raise OptionError("signals is empty: name those that a preemption begins with")
        self._checkpointer = checkpointer
        self._budget_s = budget_s
        self._together: Together | None = None
        self._why: str | None = None
        self._was_due = False
        self._notice = Notice(signals=signals, budget_s=budget_s, in_flight=self._saving, on_received=self._received)

    def __enter__(self) -> Self:
        self._together = self._checkpointer.act_together(
            timeout_s=self._budget_s * _AGREEMENT_SHARE, on_called=self._called
        )
        try:
            self._notice.__enter__()
        except BaseException as error:
            self._together.leave(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the other ranks, and put the handlers back. Of a step that they may be agreeing on nothing comes then.

        Rank 0 waits, at most 10 s, until the others know that; after an exception it does not. Where `due` was True,
        all wait until the save in flight is over; a failure of it is raised by the Checkpointer's next call.
        """
        assert self._together is not None, "it was entered"
        try:
            self._together.leave(error)
            if error is None and self._was_due:
                self._checkpointer.wait()
        finally:
            self._notice.__exit__(kind, error, traceback)

    def due(self, step: int) -> bool:
        """Whether the training is to be saved and ended, now that `step` is done; on all ranks True at the same step.

        Every rank calls it after each step, with ascending numbers. Returns at once while there was no signal anywhere.
        After one, it may wait for the moment until all ranks have said where they are, which does not depend on their
        training threads. Raises SaveTimeout, naming the ranks that said nothing, a quarter of the budget later.
        """
        assert self._together is not None, "call it inside of the context"
        self._was_due = self._together.passes(step)
        return self._was_due

    @property
    def was_due(self) -> bool:
        """Whether the training was ended for it: what `due` said last."""
        return self._was_due

    @property
    def why(self) -> str | None:
        """Which signal of which rank it is that the ranks are ending for, such as "SIGTERM on rank 1", or None."""
        return self._why

    def _received(self, number: signal.Signals) -> None:
        assert self._together is not None, "it was entered"
        self._together.call(number.name)

    def _called(self, why: str) -> None:
        self._why = why
        self._notice.begin(why)

    def _saving(self) -> str | None:
        progress = self._checkpointer.in_flight
        return None if progress is None else str(progress)
