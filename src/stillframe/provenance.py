"""Where a checkpoint comes from: versions, git commit and git diff, frozen when the Checkpointer is made."""

from __future__ import annotations

import platform
import subprocess
import threading
from importlib.metadata import version
from pathlib import Path

_GIT_TIMEOUT_S = 10
MAX_DIFF_BYTES = 256 * 1024


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


def git_diff(directory: Path | None = None) -> str | None:
    """How the tracked files of the repository differ from its commit, as `git diff` shows it; "" if they do not.

    None outside of git, and where git needs longer than 10 s. At most `MAX_DIFF_BYTES`: a longer one is cut after its
    last whole line within, and a last line says so. What is not UTF-8 in it is replaced.
    """
    # As it would be without the user's configuration: no colours, no programs, all of the repository, of which the
    # working directory may be a part.
    options = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-relative", "--src-prefix=a/", "--dst-prefix=b/")
    try:
        process = subprocess.Popen(
            _command(directory, "diff", *options, "HEAD", "--"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return None
    watchdog = threading.Timer(_GIT_TIMEOUT_S, process.kill)
    watchdog.start()
    with process:
        assert process.stdout is not None
        try:
            content = process.stdout.read(MAX_DIFF_BYTES + 1)  # not all of it: it may be gigabytes
            if len(content) > MAX_DIFF_BYTES:
                process.kill()
            elif process.wait() != 0:
                return None
        finally:
            watchdog.cancel()
    if len(content) > MAX_DIFF_BYTES:
        whole_lines = content[: content.rfind(b"\n", 0, MAX_DIFF_BYTES) + 1]
        content = whole_lines + f"[cut here: the diff is longer than {MAX_DIFF_BYTES} bytes]\n".encode()
    return content.decode(errors="replace")


def _git(directory: Path | None, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            _command(directory, *arguments),
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or no working directory any more
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _command(directory: Path | None, *arguments: str) -> list[str]:
    return ["git", "--no-optional-locks", *([] if directory is None else ["-C", str(directory)]), *arguments]
