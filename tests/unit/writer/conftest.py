"""File systems of several kinds, real ones, for the writer's tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """Mount a memory file system of a kind ("tmpfs", "ramfs") with options; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount_one(kind: str, options: str) -> Path:
        if os.geteuid() != 0:
            pytest.skip(f"mounting a {kind} needs root")
        directory = tmp_path / f"{kind}-{len(mounted)}"
        directory.mkdir()
        done = subprocess.run(
            ["mount", "-t", kind, "-o", options, "none", directory], capture_output=True, text=True, timeout=30
        )
        if done.returncode != 0:
            pytest.skip(f"mounting a {kind} is not permitted here: {done.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield mount_one
    for directory in mounted:
        subprocess.run(["umount", directory], check=True, timeout=30)
