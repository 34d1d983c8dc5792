"""Jobs of the demo: programs in sessions of their own, with every wait bounded, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

END_TIMEOUT_S = 45.0
"""More than the 30 s that torchrun gives its ranks between SIGTERM and SIGKILL."""

HERE = Path(__file__).resolve().parent


@contextlib.contextmanager
def started(command: list[str], *, timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    """A child process, which is gone on exit, and after `timeout_s` in any case; its stderr comes with its stdout."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONIOENCODING": "utf-8",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    process = subprocess.Popen(
        command,
        env=environment,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that an interrupt from the keyboard reaches this process alone, which then ends it
    )
    watchdog = threading.Timer(timeout_s, end, [process])
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """SIGTERM, at which torchrun ends its ranks (they are in sessions of their own), then SIGKILL."""
    process.terminate()
    try:
        process.wait(timeout=END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=END_TIMEOUT_S)


class KillInSave(threading.Thread):
    """SIGKILLs a whole job, launcher, ranks and writers, while it writes into `hidden_dir`.

    First everything is stopped where it is, so that what is found then is what the kill leaves. After `join`, `killed`
    has the number of processes, 0 if the job was never seen to write there, and `was_unpublished` says whether it was
    caught before the rename.
    """

    def __init__(self, process: subprocess.Popen[str], hidden_dir: Path) -> None:
        super().__init__(name="kill-in-save", daemon=True)
        self.killed = 0
        self.was_unpublished = False
        self._process = process
        self._hidden_dir = hidden_dir

    def run(self) -> None:
        while self._process.poll() is None:
            if any(self._hidden_dir.glob("*.distcp")):
                pids = [self._process.pid, *processes_below(self._process.pid)]
                signal_all(pids, signal.SIGSTOP)
                self.was_unpublished = self._hidden_dir.is_dir()
                signal_all(pids, signal.SIGKILL)
                self.killed = len(pids)
                return
            time.sleep(0.002)


def processes_below(pid: int) -> list[int]:
    """Children, their children, and so on, as /proc has them."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = children.get(pid, [])
    for child in found:
        found += children.get(child, [])
    return found


def signal_all(pids: list[int], signum: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
