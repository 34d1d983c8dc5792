"""What a process holds: its descriptors, threads and children; to be compared before and after."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from stillframe.names import HISTORY_NAME


def footprint() -> Counter[str]:
    """Everything that a process could leave open, by what it is and how often."""
    gc.collect()
    held: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:  # the descriptor by which the directory was listed
            continue
        held[f"descriptor of {target.partition(':')[0]}"] += 1
    for thread in threading.enumerate():
        held[f"thread {thread.name}"] += 1
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            held[f"child {Path(f'/proc/{pid}/cmdline').read_text()}"] += 1
    return held


def grown(before: Mapping[str, int]) -> dict[str, int]:
    """What this process holds more of than it did `before`."""
    now = footprint()
    return {what: count - before.get(what, 0) for what, count in now.items() if count > before.get(what, 0)}


def listing(directory: Path) -> list[str]:
    """All names below a directory, hidden ones too, but for the run's history; nothing if it is none."""
    if not os.path.isdir(directory):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        return []
    return sorted({str(path.relative_to(directory)) for path in directory.rglob("*")} - {HISTORY_NAME})
