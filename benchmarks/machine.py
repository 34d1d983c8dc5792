"""What is printed beside every figure: hardware, versions, commit."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from stillframe.provenance import git_commit, versions


def end_cleanly_when_told_to() -> None:
    """Take SIGTERM as a Ctrl-C, so that ranks and the gigabytes in temporary folders end with the benchmark."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def describe(directory: Path) -> str:
    """Lines that say where figures come from; `directory` is what was written to."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    file_system = subprocess.run(
        ["stat", "-f", "-c", "%T", str(directory)], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
    listed = ", ".join(f"{package} {version}" for package, version in versions().items())
    return (
        f"{os.cpu_count()} x {cpu}, {memory_gib:.0f} GiB, {file_system}, Linux {platform.release()}\n"
        f"{listed}, commit {git_commit(Path(__file__).parent) or 'unknown'}"
    )


def pss_bytes(pid: int) -> int:
    """The proportional set size of a process: what it alone uses of memory, and its share of what others use too."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no Pss")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`median (minimum to maximum)`."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
