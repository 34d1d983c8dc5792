"""What happens inside one process that `stillframe.testing.ranks` starts.

The launcher and its processes share a scratch directory. Process `r` leaves there what it printed (`r.output`), the
stack that the launcher asked for (`r.stack`), and how its function ended: `r.value` or `r.failure`, both pickled. Files
rather than a pipe, so that no reader ever waits for a writer that was stopped or killed in the middle.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import fcntl
import os
import pickle
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LAUNCH_ID_VARIABLE = "STILLFRAME_TESTING_LAUNCH"
"""Set in every launched process; programs that it executes inherit it, which is how leftovers are recognised."""

STACK_SIGNAL = signal.SIGRTMAX
"""Makes a launched process write all its threads' stacks. Not SIGUSR1 or SIGUSR2: training code may use those."""

WarningFilter = tuple[Any, ...]
"""An entry of `warnings.filters`: action, message pattern or None, category, module pattern or None, line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """What a launched process is told: who it is, and what it does. `call` is a pickled (function, arguments)."""

    rank: int
    world_size: int
    backend: str | None
    timeout_s: float
    launch_id: str
    scratch_dir: Path
    environ: dict[str, str]
    warning_filters: tuple[WarningFilter, ...]
    call: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """How one rank failed.

    `reason` is one line. `traceback` is that of the exception, or the stacks of a rank that was late, or empty.
    `error` is the exception itself, where it can be pickled. `output` is the end of what the process printed.
    """

    rank: int
    reason: str
    traceback: str
    error: BaseException | None
    output: str


_control: Connection | None = None
_control_lock = threading.Lock()


def reached(name: str) -> None:
    """Tell the launcher's `Ranks` handle that this rank reached the point `name`, and go on."""
    with _control_lock:
        _launcher().send(("reached", name))


def hold_at(name: str, *, timeout_s: float = 60.0) -> None:
    """Tell the launcher's `Ranks` handle that this rank reached `name`, and wait there until it calls `release`.

    Raises TimeoutError after `timeout_s`.
    """
    with _control_lock:
        launcher = _launcher()
        launcher.send(("reached", name))
        if not launcher.poll(timeout_s):
            raise TimeoutError(f"held at {name!r} for {timeout_s:g} s, and nobody released it")
        launcher.recv()


def _launcher() -> Connection:
    if _control is None:
        raise RuntimeError("reached() and hold_at() work only in a process that stillframe.testing started")
    return _control


def stack_path(scratch_dir: Path, rank: int) -> Path:
    """Where rank `rank` writes its stacks when it gets STACK_SIGNAL."""
    return scratch_dir / f"{rank}.stack"


def main(spec: ProcessSpec, control: Connection, lifeline: Connection) -> None:
    """Run the function of `spec` and leave its value or failure; the target of every launched process."""
    global _control
    _control = control
    _die_with_launcher(lifeline)
    os.setsid()
    with (spec.scratch_dir / f"{spec.rank}.output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what a killed rank printed must be there
    stack_file = stack_path(spec.scratch_dir, spec.rank).open("w")
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, file=stack_file, all_threads=True)
    _adopt_environment(spec)

    unhandled = _collect_unhandled()
    failure: tuple[str, str, BaseException | None] | None = None
    try:
        with _process_group(spec):
            function, arguments = pickle.loads(spec.call)
            value = pickle.dumps(function(*arguments))
            if spec.backend is not None:
                _await_the_others(control, timeout_s=spec.timeout_s)
    except BaseException as error:  # noqa: BLE001 - whatever it is, SystemExit included, the launcher raises it
        failure = (f"{type(error).__name__}: {error}", traceback.format_exc(), error)
        _leave_failure(spec, *failure)
        control.send(("failed", ""))
    else:
        _leave(spec, "value", value)
    _end_like_an_interpreter()
    if unhandled:
        reason, text, cause = failure or ("an exception that nothing handled", "", None)
        _leave_failure(spec, reason, "\n".join([text, *unhandled]), cause)


def _die_with_launcher(lifeline: Connection) -> None:
    """Have the kernel kill this process when the launcher is gone, however it went.

    The launcher alone holds the other end and never writes, so the only event on `lifeline` is its closing.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll():
        raise SystemExit("the launcher ended before this process began")


def _adopt_environment(spec: ProcessSpec) -> None:
    """Take over what a child of the launcher would have inherited: this one was forked from the fork server."""
    os.environ.clear()
    os.environ.update(spec.environ)
    os.environ[LAUNCH_ID_VARIABLE] = spec.launch_id
    warnings.resetwarnings()
    for action, message, category, module, line in spec.warning_filters:
        warnings.filterwarnings(action, _pattern(message), category, _pattern(module), line, append=True)


def _pattern(compiled: re.Pattern[str] | str | None) -> str:
    return "" if compiled is None else getattr(compiled, "pattern", str(compiled))


def _await_the_others(control: Connection, *, timeout_s: float) -> None:
    """Stay until every rank's function has ended: one that leaves earlier closes connections that others still set up.

    The launcher knows when that is, also for ranks that raised or died. It ends this wait itself when its time is up.
    """
    control.send(("returned", ""))
    if not control.poll(timeout_s + 60):
        raise TimeoutError(f"the launcher said nothing for {timeout_s + 60:g} s")
    control.recv()


@contextlib.contextmanager
def _process_group(spec: ProcessSpec) -> Iterator[None]:
    if spec.backend is None:
        yield
        return
    import torch.distributed as dist

    # As torchrun would set them. Gloo otherwise resolves the host's name, which not every container can.
    os.environ.update(RANK=str(spec.rank), LOCAL_RANK=str(spec.rank))
    os.environ.update(WORLD_SIZE=str(spec.world_size), LOCAL_WORLD_SIZE=str(spec.world_size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # A file needs no port, so there is none to race for.
    init_method = f"file://{spec.scratch_dir / 'rendezvous'}"
    # Longer than the launcher waits: its report names who is late and where, which is worth more than gloo's.
    timeout = timedelta(seconds=2 * spec.timeout_s + 60)
    dist.init_process_group(
        spec.backend, init_method=init_method, rank=spec.rank, world_size=spec.world_size, timeout=timeout
    )
    yield
    # Not after an exception: the others may be in a collective that this rank left, and the process ends anyway.
    if dist.is_initialized():
        dist.destroy_process_group()


def _collect_unhandled() -> list[str]:
    """Collect what would only be printed: exceptions that end a thread, or that nobody can catch."""
    unhandled: list[str] = []

    def of_thread(args: threading.ExceptHookArgs) -> None:
        name = "?" if args.thread is None else args.thread.name
        lines = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
        unhandled.append(f"in thread {name!r}:\n{''.join(lines)}")

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        lines = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
        unhandled.append(f"{args.err_msg or 'ignored'} in {args.object!r}:\n{''.join(lines)}")

    threading.excepthook = of_thread
    sys.unraisablehook = unraisable
    return unhandled


def _end_like_an_interpreter() -> None:
    """Wait for threads, then run exit functions. multiprocessing's own end skips the latter (cpython#83856)."""
    shutdown: Callable[[], None] = threading._shutdown  # type: ignore[attr-defined]
    shutdown()
    atexit._run_exitfuncs()


def _leave_failure(spec: ProcessSpec, reason: str, text: str, error: BaseException | None) -> None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - any class may refuse; the reason and the traceback say it all in words
        error = None
    _leave(spec, "failure", pickle.dumps((reason, text, error)))


def _leave(spec: ProcessSpec, kind: str, content: bytes) -> None:
    path = spec.scratch_dir / f"{spec.rank}.{kind}"
    unfinished_path = path.with_suffix(".unfinished")
    unfinished_path.write_bytes(content)
    unfinished_path.replace(path)


def has_value(scratch_dir: Path, rank: int) -> bool:
    """Whether the function returned on `rank`."""
    return (scratch_dir / f"{rank}.value").exists()


def read_value(scratch_dir: Path, rank: int) -> Any:
    """What the function returned on `rank`."""
    return pickle.loads((scratch_dir / f"{rank}.value").read_bytes())


def read_failure(scratch_dir: Path, rank: int) -> tuple[str, str, BaseException | None] | None:
    """Reason, traceback and exception that `rank` left, or None if it left none."""
    path = scratch_dir / f"{rank}.failure"
    if not path.exists():
        return None
    reason, text, error = pickle.loads(path.read_bytes())
    return reason, text, error


def read_output(scratch_dir: Path, rank: int, *, lines: int = 100) -> str:
    """The last `lines` lines that `rank` printed; empty if it never began."""
    path = scratch_dir / f"{rank}.output"
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
