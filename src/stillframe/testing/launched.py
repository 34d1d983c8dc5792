"""One launched process, as its launcher sees it: what it says, how it ended, and ending it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from stillframe.testing import fork_server, rank_process
from stillframe.testing.rank_process import ProcessSpec, RankFailure

T = TypeVar("T")

KILL_WAIT_S = 10.0
"""How long a process that was killed may take to be gone."""
_STACK_WAIT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOutcome(Generic[T]):
    """How one rank ended: with the `value` that its function returned, or with a `failure`; the other is None."""

    rank: int
    value: T | None
    failure: RankFailure | None


class LaunchedRank:
    """A running or ended process. `listen` and `wait_ended` bring the attributes up to date; nothing else does.

    `reached` has the names of the points that it announced. `failed`: its function raised, or it ended without a
    result. `returned`: its function returned, and it waits to be told that it may end. `ended`: the process is gone.
    """

    def __init__(self, spec: ProcessSpec) -> None:
        self.rank = spec.rank
        self.reached: set[str] = set()
        self.failed = False
        self.returned = False
        self.ended = False
        self._scratch_dir = spec.scratch_dir
        self._late: RankFailure | None = None
        started = fork_server.start_process(spec)
        self._process = started.process
        self._lifeline = started.lifeline
        self.control: Connection = started.control
        self.control_open = True
        assert self._process.pid is not None, "it was started"
        self.pid = self._process.pid

    @property
    def sentinel(self) -> int:
        """Ready for reading, as `multiprocessing.connection.wait` understands it, when the process is gone."""
        return self._process.sentinel

    def listen(self) -> None:
        """Take in what the process has said so far; does not block."""
        try:
            while self.control_open and self.control.poll():
                kind, name = self.control.recv()
                self.failed |= kind == "failed"
                self.returned |= kind == "returned"
                self.reached |= {name} if kind == "reached" else set()
        except (EOFError, ConnectionResetError):  # the process is gone; its sentinel says so too
            self.control_open = False

    def let_end(self) -> None:
        """Tell it, if it waits to be told, that it may end."""
        if self.returned and not self.ended:
            self.returned = False
            with contextlib.suppress(BrokenPipeError):  # it was killed this very moment
                self.control.send("end")

    def signal(self, signum: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self._process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended this very moment
                os.kill(self.pid, signum)

    def wait_ended(self) -> None:
        """Wait for the end of a process that is known to end; RuntimeError if it does not within 10 seconds."""
        self._process.join(KILL_WAIT_S)
        if self._process.exitcode is None:
            raise RuntimeError(f"rank {self.rank} (process {self.pid}) is still there {KILL_WAIT_S:g} s after its end")
        self.listen()
        self.ended = True
        self.failed |= self.failure() is not None

    def kill(self) -> None:
        """SIGKILL it, and return when it is gone."""
        self.signal(signal.SIGKILL)
        self.wait_ended()

    def ask_for_stacks(self) -> None:
        """Make it write the stacks of its threads, for `give_up` to report."""
        self.signal(rank_process.STACK_SIGNAL)

    def give_up(self, reason: str) -> None:
        """Kill it, and report it as failed for `reason`, with the stacks that it was asked for."""
        stacks = self._await_stacks()
        self.signal(signal.SIGKILL)
        left = rank_process.read_failure(self._scratch_dir, self.rank)
        if left is None:
            self._late = self.describe(reason, stacks)
        else:  # its function had failed, but the process did not end
            self._late = self.describe(f"{left[0]}; and {reason}", f"{left[1]}\n{stacks}", left[2])
        self.wait_ended()

    def outcome(self) -> RankOutcome[T]:
        """How it ended; only for a process that has."""
        failure = self.failure()
        value = None if failure is not None else rank_process.read_value(self._scratch_dir, self.rank)
        return RankOutcome(rank=self.rank, value=value, failure=failure)

    def failure(self) -> RankFailure | None:
        """How it failed, or None if it returned a value; only for a process that has ended."""
        if self._late is not None:
            return self._late
        left = rank_process.read_failure(self._scratch_dir, self.rank)
        if left is not None:
            return self.describe(*left)
        returned = rank_process.has_value(self._scratch_dir, self.rank)
        exitcode = self._process.exitcode
        if returned and exitcode == 0:
            return None
        assert exitcode is not None, "only asked of processes that ended"
        how = f"killed by {_signal_name(-exitcode)}" if exitcode < 0 else f"ended with exit code {exitcode}"
        return self.describe(how + (" after its function returned" if returned else ""))

    def describe(self, reason: str, traceback: str = "", error: BaseException | None = None) -> RankFailure:
        """A failure of this rank, with what it printed."""
        output = rank_process.read_output(self._scratch_dir, self.rank)
        return RankFailure(rank=self.rank, reason=reason, traceback=traceback, error=error, output=output)

    def close(self) -> None:
        """Release the connections to a process that has ended."""
        self.control.close()
        self._lifeline.close()
        self._process.close()

    def _await_stacks(self) -> str:
        """The process does not say when it has written them: what stays the same for 0.1 s counts as whole."""
        path = rank_process.stack_path(self._scratch_dir, self.rank)
        give_up_at = time.monotonic() + _STACK_WAIT_S
        text = ""
        while time.monotonic() < give_up_at:
            time.sleep(0.1)
            before, text = text, path.read_text() if path.exists() else ""
            if text and text == before:
                return text
        return text or f"(it gave no stack within {_STACK_WAIT_S:g} s: stopped, or blocked in the kernel)"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the two that have names
        return f"signal {number}"
