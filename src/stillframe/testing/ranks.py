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
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar, TypeVarTuple, Unpack, cast

from stillframe.testing import leftovers
from stillframe.testing.launched import KILL_WAIT_S, LaunchedRank, RankOutcome
from stillframe.testing.rank_process import ProcessSpec, RankFailure

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_GRACE_S = 3.0
"""After the first failure, the other ranks have this long to notice it and to end by themselves."""
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
        self._ranks: list[LaunchedRank] = []
        self._closing = contextlib.ExitStack()
        self._deadline = 0.0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="stillframe-ranks-"))
            self._scratch_dir = Path(scratch)
            stack.callback(self._kill_all)
            for rank in range(self._world_size):
                self._ranks.append(self._start(rank))
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
        return tuple(rank.pid for rank in self._ranks)

    def join(self) -> list[T]:
        """Wait for all ranks and return their results by rank; raises RankFailed as `run_ranks` does."""
        first_failure_at: float | None = None
        while (running := self._running()) and time.monotonic() < self._deadline:
            if first_failure_at is None and any(rank.failed for rank in self._ranks):
                first_failure_at = time.monotonic()
            give_up_at = self._deadline if first_failure_at is None else first_failure_at + _GRACE_S
            if time.monotonic() >= give_up_at:
                self._give_up(running, f"still running {_GRACE_S:g} s after another rank failed")
            self._wait_for_event(min(give_up_at, self._deadline))
        outcomes = self.outcomes()
        failures = tuple(outcome.failure for outcome in outcomes if outcome.failure is not None)
        if failures:
            raise RankFailed(failures, self._world_size)
        return [cast(T, outcome.value) for outcome in outcomes]

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
        return tuple(rank.outcome() for rank in self._ranks)

    def wait_reached(self, name: str, *, rank: int, timeout_s: float = 60.0) -> None:
        """Wait until `rank` has called `reached(name)` or `hold_at(name)`; returns at once if it has already.

        Raises RankFailed if the rank ended before, or did not get there within `timeout_s` (it is then killed).
        """
        launched = self._ranks[rank]
        give_up_at = min(self._deadline, time.monotonic() + timeout_s)
        while name not in launched.reached and time.monotonic() < give_up_at:
            if launched.returned or launched.ended:
                break
            self._wait_for_event(give_up_at)
        if name in launched.reached:
            return
        if not (launched.returned or launched.ended):
            self._give_up([launched], f"late: did not reach {name!r} in {timeout_s:g} s")
        failure = launched.failure() if launched.ended else None
        raise RankFailed((failure or launched.describe(f"ended without reaching {name!r}"),), self._world_size)

    def release(self, rank: int) -> None:
        """Let `rank` go on from the `hold_at` that it waits in."""
        self._ranks[rank].control.send("go on")

    def send_signal(self, rank: int, signum: signal.Signals) -> None:
        """Send a signal to `rank`. After SIGKILL, returns when the process is gone. Nothing happens if it had ended."""
        if signum == signal.SIGKILL:
            self._ranks[rank].kill()
        else:
            self._ranks[rank].signal(signum)

    def _start(self, rank: int) -> LaunchedRank:
        return LaunchedRank(
            ProcessSpec(
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
        )

    def _running(self) -> list[LaunchedRank]:
        return [rank for rank in self._ranks if not rank.ended]

    def _wait_for_event(self, until: float) -> None:
        """Take in what the ranks said and which ones ended; waits for the first such event, until `until` at most."""
        controls = {rank.control: rank for rank in self._ranks if rank.control_open}
        sentinels = {rank.sentinel: rank for rank in self._running()}
        for source in connection.wait([*controls, *sentinels], timeout=max(0.0, until - time.monotonic())):
            if isinstance(source, connection.Connection):
                controls[source].listen()
            elif isinstance(source, int):
                sentinels[source].wait_ended()
        self._let_end()

    def _let_end(self) -> None:
        """Once no rank's function runs any more, those that returned may end."""
        if all(rank.returned or rank.failed or rank.ended for rank in self._ranks):
            for rank in self._ranks:
                rank.let_end()

    def _give_up(self, late: list[LaunchedRank], reason: str) -> None:
        """Kill the ranks that are late; those that only wait for them may end by themselves."""
        waiting = [rank for rank in late if rank.returned]
        hung = [rank for rank in late if not rank.returned]
        for rank in hung:
            rank.ask_for_stacks()
        for rank in hung:
            rank.give_up(reason)
        if waiting:
            self._let_end()
            give_up_at = time.monotonic() + _GRACE_S
            while any(not rank.ended for rank in waiting) and time.monotonic() < give_up_at:
                self._wait_for_event(give_up_at)
            self._give_up([rank for rank in waiting if not rank.ended], "its function returned, but it did not end")

    def _kill_all(self) -> None:
        for rank in self._running():
            rank.signal(signal.SIGKILL)
        for rank in self._running():
            rank.wait_ended()
        leftovers.end(self._launch_id, self.pids, timeout_s=KILL_WAIT_S)
        for rank in self._ranks:
            rank.close()
