"""Where a checkpoint comes from: versions and the git commit, frozen when the Checkpointer is made."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

_GIT_TIMEOUT_S = 10


def versions() -> dict[str, str]:
    packages = ("stillframe", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def git_commit(directory: Path | None = None) -> str | None:
    """The commit checked out in `directory` (None: the working directory), "-dirty" appended if tracked files differ
    from it; None outside of git."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changes else commit


def _git(directory: Path | None, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "--no-optional-locks", *([] if directory is None else ["-C", str(directory)]), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or no working directory any more
        return None
    return result.stdout.strip() if result.returncode == 0 else None
