"""Writer processes held back by SIGSTOP, so that a test decides what happens between two steps of a save."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import stillframe


def writer_pid(ckpt: stillframe.Checkpointer) -> int:
    return ckpt.writer_pid


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> None:
    """Wait for something that announces itself by no event."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"waited {timeout_s:g} s until {what}"
        time.sleep(0.005)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does nothing while inside, and goes on afterwards, if it was not killed."""
    os.kill(pid, signal.SIGSTOP)
    wait_until_stopped(pid)
    try:
        yield
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGCONT)


def wait_until_stopped(pid: int) -> None:
    """Wait for the effect of a SIGSTOP, which comes to each thread in its own time."""
    wait_until(lambda: set(thread_states(pid)) == {"T"}, f"process {pid} stopped")


def thread_states(pid: int) -> list[str]:
    """As proc_pid_stat(5) has them."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


def asked(ckpt: stillframe.Checkpointer) -> bool:
    """Whether this rank's writer has been asked to write the save in flight."""
    progress = ckpt.in_flight
    return progress is not None and progress.bytes_total > 0
