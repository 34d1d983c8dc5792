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
    export = ckpt._export
    assert export is not None
    return export.writer.pid


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
    wait_until(lambda: process_state(pid) == "T", "the writer stopped")
    try:
        yield
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGCONT)


def process_state(pid: int) -> str:
    """As proc_pid_stat(5) has it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def asked(ckpt: stillframe.Checkpointer) -> bool:
    """Whether this rank's writer has been asked to write the save in flight."""
    progress = ckpt.in_flight
    return progress is not None and progress.bytes_total > 0
