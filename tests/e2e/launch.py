"""Start the real command line, alone or under torchrun, with every wait bounded."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 120.0
END_TIMEOUT_S = 45.0


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str


def environment(**extra: str) -> dict[str, str]:
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return os.environ | offline | {"GLOO_SOCKET_IFNAME": "lo"} | extra


@contextlib.contextmanager
def started(command: list[str], *, work_dir: Path, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own; gone on exit, and after `TIMEOUT_S` in any case."""
    process = subprocess.Popen(
        command,
        cwd=work_dir,
        env=environment(**extra),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    watchdog = threading.Timer(TIMEOUT_S, end, [process])
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        end(process)
        process.communicate(timeout=END_TIMEOUT_S)


def end(process: subprocess.Popen[str]) -> None:
    """SIGTERM, at which torchrun ends its ranks (they are in sessions of their own), then SIGKILL."""
    process.terminate()
    try:
        process.wait(timeout=END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def run(command: list[str], *, work_dir: Path, **extra: str) -> Ended:
    with started(command, work_dir=work_dir, **extra) as process:
        stdout, stderr = process.communicate()  # bounded by the watchdog
        return Ended(process.returncode, stdout, stderr)


def alone(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "stillframe", *arguments]


def torchrun(ranks: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "stillframe", *arguments]
