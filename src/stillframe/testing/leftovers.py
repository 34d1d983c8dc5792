"""Find and end what launched processes left behind: programs that they executed, or children that they forked.

Read from /proc (Linux). A process belongs to a launch if it is in the session of one of its ranks, or if it was
executed with the launch's id in its environment; a program that left the session still has the latter.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from stillframe.testing.rank_process import LAUNCH_ID_VARIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A process that outlived the rank it came from."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


def find(launch_id: str, sessions: Collection[int]) -> list[Leftover]:
    """The running processes of a launch, by process id; zombies are not running."""
    marker = f"{LAUNCH_ID_VARIABLE}={launch_id}".encode()
    found = []
    for process_dir in Path("/proc").iterdir():
        if not process_dir.name.isdecimal():
            continue
        try:
            state, session = _state_and_session(process_dir)
            if state in "ZX":
                continue
            if session in sessions or marker in (process_dir / "environ").read_bytes().split(b"\0"):
                command = (process_dir / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(Leftover(pid=int(process_dir.name), command=command.strip()))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is another user's and so not ours
    return sorted(found, key=lambda process: process.pid)


def wait_until_gone(launch_id: str, sessions: Collection[int], *, timeout_s: float) -> list[Leftover]:
    """Wait until nothing of a launch runs any more; returns what still does after `timeout_s`."""
    give_up_at = time.monotonic() + timeout_s
    while (left := find(launch_id, sessions)) and time.monotonic() < give_up_at:
        time.sleep(0.02)  # not our children, so there is nothing to wait on
    return left


def end(launch_id: str, sessions: Collection[int], *, timeout_s: float) -> None:
    """SIGKILL whatever of a launch still runs, and return when it is gone; RuntimeError if it is not in time."""
    give_up_at = time.monotonic() + timeout_s
    while left := find(launch_id, sessions):
        if time.monotonic() >= give_up_at:
            what = "; ".join(str(process) for process in left)
            raise RuntimeError(f"still there {timeout_s:g} s after SIGKILL: {what}")
        for process in left:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)


def _state_and_session(process_dir: Path) -> tuple[str, int]:
    # pid (command) state ppid pgrp session ...; the command may contain spaces and parentheses (proc_pid_stat(5)).
    fields = (process_dir / "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[3])
