"""Run a function on real ranks: processes of their own, with torch.distributed between them.

    def sum_of_ranks(offset: int) -> float:
        total = torch.tensor(dist.get_rank() + offset)
        dist.all_reduce(total)
        return total.item()

    run_ranks(3, sum_of_ranks, 10)  # [33, 33, 33]

The processes are forked from one server process that has imported torch and Transformers already, so that a launch
costs a fraction of a second after the first. They never inherit the caller's threads, locks or CUDA context. Each has
a session and a temporary directory, the caller's environment, working directory and warning filters, and one thread
for computation. Whatever happens, none outlives the call, nor does a program that it started; if the caller itself is
killed, the kernel kills them.

The function travels by its name, so it must be importable: define it at the top level of a module.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar, TypeVarTuple, Unpack

from stillframe.testing import fork_server, leftovers, rank_process
from stillframe.testing.rank_process import ProcessSpec, RankFailure

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_GRACE_S = 3.0
"""After the first failure, the other ranks have this long to notice it and to end by themselves."""
_STACK_WAIT_S = 2.0
_KILL_WAIT_S = 10.0
_LEFTOVERS_WAIT_S = 10.0


class RankFailed(RuntimeError):
    """One or more ranks failed, were killed, or were late; the message has each one's traceback and output.

    `failures` has one `RankFailure` for each, in rank order.
    """

    def __init__(self, failures: tuple[RankFailure, ...], world_size: int) -> None:
        super().__init__(failures, world_size)
        self.failures = failures
        self.world_size = world_size

    def __str__(self) -> str:
        names = ", ".join(str(failure.rank) for failure in self.failures)
        parts = [f"{len(self.failures)} of {self.world_size} ranks failed: {names}"]
        for failure in self.failures:
            parts.append(f"--- rank {failure.rank}: {failure.reason}")
            parts += [text for text in (failure.traceback.rstrip(),) if text]
            if failure.output:
                parts.append(f"--- rank {failure.rank} printed:\n{failure.output.rstrip()}")
        return "\n".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOutcome(Generic[T]):
    """How one rank ended: with the `value` that its function returned, or with a `failure`; the other is None."""

    rank: int
    value: T | None
    failure: RankFailure | None


def run_ranks(
    world_size: int, fn: Callable[[Unpack[Ts]], T], *args: *Ts, timeout_s: float = 120.0, backend: str = "gloo"
) -> list[T]:
    """Run `fn(*args)` on `world_size` ranks with torch.distributed initialised, and return the results by rank.

    Blocks until all processes are gone, at most `timeout_s` and a few seconds. Raises RankFailed if any rank raised,
    died, or was late; the others then have 3 seconds to end by themselves before they are killed.
    """
    with Ranks(world_size, fn, *args, timeout_s=timeout_s, backend=backend) as ranks:
        return ranks.join()


def run_process(fn: Callable[[Unpack[Ts]], T], *args: *Ts, timeout_s: float = 120.0) -> T:
    """Run `fn(*args)` in one fresh process without torch.distributed, and return its result; else like `run_ranks`."""
    with Ranks(1, fn, *args, timeout_s=timeout_s, backend=None) as ranks:
        return ranks.join()[0]


@dataclass(slots=True)
class _Member:
    """One launched process as the launcher sees it."""

    rank: int
    process: BaseProcess
    control: connection.Connection
    lifeline: connection.Connection
    reached: set[str] = field(default_factory=set)
    control_open: bool = True
    ended: bool = False
    failed: bool = False
    late: RankFailure | None = None

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


class Ranks(Generic[T]):
    """A handle on running ranks, for tests that watch, stop or kill them.

        with Ranks(2, train, run_dir) as ranks:
            ranks.wait_reached("staged", rank=1)  # the function called testing.hold_at("staged")
            ranks.send_signal(1, signal.SIGKILL)
            outcomes = ranks.outcomes()

    Starts the processes on entry. `timeout_s` bounds their whole life, from then on. On exit, whatever still runs is
    killed. `backend=None` leaves torch.distributed alone.
    """

    def __init__(
        self,
        world_size: int,
        fn: Callable[[Unpack[Ts]], T],
        *args: *Ts,
        timeout_s: float = 120.0,
        backend: str | None = "gloo",
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}; it must be at least 1")
        try:
            self._call = pickle.dumps((fn, args))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            name = getattr(fn, "__qualname__", repr(fn))
            raise TypeError(
                f"cannot send {name} and its arguments to another process: {error}. "
                "Define the function at the top level of an importable module, and pass only what can be pickled"
            ) from error
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._backend = backend
        self._launch_id = uuid.uuid4().hex
        self._members: list[_Member] = []
        self._closing = contextlib.ExitStack()
        self._deadline = 0.0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="stillframe-ranks-"))
            self._scratch_dir = Path(scratch)
            stack.callback(self._kill_all)
            for rank in range(self._world_size):
                self._members.append(self._start(rank))
            self._closing = stack.pop_all()
        self._deadline = time.monotonic() + self._timeout_s
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids, by rank. A rank's session has the same id."""
        return tuple(member.pid for member in self._members)

    def join(self) -> list[T]:
        """Wait for all ranks and return their results by rank; raises RankFailed as `run_ranks` does."""
        first_failure_at: float | None = None
        while (running := self._running()) and time.monotonic() < self._deadline:
            if first_failure_at is None and any(member.failed for member in self._members):
                first_failure_at = time.monotonic()
            give_up_at = self._deadline if first_failure_at is None else first_failure_at + _GRACE_S
            if time.monotonic() >= give_up_at:
                self._give_up(running, f"still running {_GRACE_S:g} s after another rank failed")
            self._wait_for_event(min(give_up_at, self._deadline))
        outcomes = self.outcomes()
        failures = tuple(outcome.failure for outcome in outcomes if outcome.failure is not None)
        if failures:
            raise RankFailed(failures, self._world_size)
        return [rank_process.read_value(self._scratch_dir, rank) for rank in range(self._world_size)]

    def outcomes(self) -> tuple[RankOutcome[T], ...]:
        """Wait until every rank has ended, each in its own way, and say how; nothing is raised for a failed rank.

        Ranks that still run when `timeout_s` is over are killed and reported as late. Programs that the ranks started
        have 10 more seconds to end by themselves; RuntimeError, with their command lines, if they do not.
        """
        while self._running() and time.monotonic() < self._deadline:
            self._wait_for_event(self._deadline)
        self._give_up(self._running(), f"late: still running after {self._timeout_s:g} s")
        left = leftovers.wait_until_gone(self._launch_id, self.pids, timeout_s=_LEFTOVERS_WAIT_S)
        if left:
            what = "; ".join(str(process) for process in left)
            raise RuntimeError(f"{_LEFTOVERS_WAIT_S:g} s after the last rank ended, these it left still ran: {what}")
        return tuple(self._outcome(member) for member in self._members)

    def wait_reached(self, name: str, *, rank: int, timeout_s: float = 60.0) -> None:
        """Wait until `rank` has called `reached(name)` or `hold_at(name)`; returns at once if it has already.

        Raises RankFailed if the rank ended before, or did not get there within `timeout_s` (it is then killed).
        """
        member = self._members[rank]
        give_up_at = min(self._deadline, time.monotonic() + timeout_s)
        while name not in member.reached and not member.ended and time.monotonic() < give_up_at:
            self._wait_for_event(give_up_at)
        if name in member.reached:
            return
        self._give_up([member] if not member.ended else [], f"late: did not reach {name!r} in {timeout_s:g} s")
        failure = self._failure_of(member) or self._failure(rank, f"ended without reaching {name!r}")
        raise RankFailed((failure,), self._world_size)

    def release(self, rank: int) -> None:
        """Let `rank` go on from the `hold_at` that it waits in."""
        self._members[rank].control.send("go on")

    def send_signal(self, rank: int, signum: signal.Signals) -> None:
        """Send a signal to `rank`. After SIGKILL, returns when the process is gone. Nothing happens if it had ended."""
        member = self._members[rank]
        if member.process.exitcode is not None:
            return
        with contextlib.suppress(ProcessLookupError):  # it ended this very moment
            os.kill(member.pid, signum)
        if signum == signal.SIGKILL:
            self._wait_ended(member)

    def _start(self, rank: int) -> _Member:
        spec = ProcessSpec(
            rank=rank,
            world_size=self._world_size,
            backend=self._backend,
            timeout_s=self._timeout_s,
            launch_id=self._launch_id,
            scratch_dir=self._scratch_dir,
            environ=dict(os.environ),
            warning_filters=tuple(warnings.filters),
            call=self._call,
        )
        started = fork_server.start_process(spec)
        return _Member(rank=rank, process=started.process, control=started.control, lifeline=started.lifeline)

    def _running(self) -> list[_Member]:
        return [member for member in self._members if not member.ended]

    def _wait_for_event(self, until: float) -> None:
        """Take in what the ranks said and which ones ended; waits for the first such event, until `until` at most."""
        controls = {member.control: member for member in self._members if member.control_open}
        sentinels = {member.process.sentinel: member for member in self._running()}
        ready = connection.wait([*controls, *sentinels], timeout=max(0.0, until - time.monotonic()))
        for source in ready:
            if isinstance(source, connection.Connection):
                self._listen(controls[source])
            elif isinstance(source, int):
                self._wait_ended(sentinels[source])

    def _listen(self, member: _Member) -> None:
        try:
            while member.control_open and member.control.poll():
                kind, name = member.control.recv()
                member.failed |= kind == "failed"
                member.reached |= {name} if kind == "reached" else set()
        except (EOFError, ConnectionResetError):  # the rank is gone; its sentinel says so too
            member.control_open = False

    def _wait_ended(self, member: _Member) -> None:
        member.process.join(_KILL_WAIT_S)
        if member.process.exitcode is None:
            raise RuntimeError(
                f"rank {member.rank} (process {member.pid}) is still there {_KILL_WAIT_S:g} s after it was killed"
            )
        self._listen(member)
        member.ended = True
        member.failed |= self._failure_of(member) is not None

    def _give_up(self, late: list[_Member], reason: str) -> None:
        """Kill ranks that are late, having asked each for its stacks."""
        for member in late:
            self.send_signal(member.rank, rank_process.STACK_SIGNAL)
        for member in late:
            stack = self._await_stack(member.rank)
            member.process.kill()
            left = rank_process.read_failure(self._scratch_dir, member.rank)
            if left is None:
                member.late = self._failure(member.rank, reason, stack)
            else:  # its function had failed, but the process did not end
                member.late = self._failure(member.rank, f"{left[0]}; and {reason}", f"{left[1]}\n{stack}", left[2])
            self._wait_ended(member)

    def _await_stack(self, rank: int) -> str:
        """The stacks that a rank writes when asked. It does not say when it is done: settled for 0.1 s counts."""
        path = rank_process.stack_path(self._scratch_dir, rank)
        give_up_at = time.monotonic() + _STACK_WAIT_S
        text = ""
        while time.monotonic() < give_up_at:
            time.sleep(0.1)
            before, text = text, path.read_text() if path.exists() else ""
            if text and text == before:
                return text
        return text or f"(it gave no stack within {_STACK_WAIT_S:g} s: stopped, or blocked in the kernel)"

    def _outcome(self, member: _Member) -> RankOutcome[T]:
        failure = self._failure_of(member)
        value = None if failure is not None else rank_process.read_value(self._scratch_dir, member.rank)
        return RankOutcome(rank=member.rank, value=value, failure=failure)

    def _failure_of(self, member: _Member) -> RankFailure | None:
        if member.late is not None:
            return member.late
        left = rank_process.read_failure(self._scratch_dir, member.rank)
        if left is not None:
            return self._failure(member.rank, *left)
        returned = rank_process.has_value(self._scratch_dir, member.rank)
        exitcode = member.process.exitcode
        if returned and exitcode == 0:
            return None
        assert exitcode is not None, "only asked of processes that ended"
        how = f"killed by {_signal_name(-exitcode)}" if exitcode < 0 else f"ended with exit code {exitcode}"
        return self._failure(member.rank, how + (" after its function returned" if returned else ""))

    def _failure(self, rank: int, reason: str, traceback: str = "", error: BaseException | None = None) -> RankFailure:
        output = rank_process.read_output(self._scratch_dir, rank)
        return RankFailure(rank=rank, reason=reason, traceback=traceback, error=error, output=output)

    def _kill_all(self) -> None:
        for member in self._running():
            member.process.kill()
        for member in self._running():
            self._wait_ended(member)
        leftovers.end(self._launch_id, self.pids, timeout_s=_KILL_WAIT_S)
        for member in self._members:
            member.control.close()
            member.lifeline.close()
            member.process.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the two that have names
        return f"signal {number}"
