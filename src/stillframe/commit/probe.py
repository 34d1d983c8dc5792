"""Before anything is saved: is the run directory one file system for all ranks, and may each write there?"""

from __future__ import annotations

import errno
from pathlib import Path

from stillframe.durable import remove_tree
from stillframe.errors import RunDirectoryError


class Probe:
    """Rank 0 makes a directory, every rank puts a file into it, rank 0 counts the files and removes all of it."""

    def __init__(self, run_dir: Path, nonce: str) -> None:
        self._run_dir = run_dir
        self._probe_dir = run_dir / f".stillframe-probe-{nonce}"

    def begin(self) -> None:
        """Rank 0. Raises RunDirectoryError where the run directory cannot be written."""
        try:
            self._probe_dir.mkdir()
        except OSError as error:
            raise RunDirectoryError(f"cannot write in the run directory {self._run_dir}: {error.strerror}") from error

    def take_part(self, rank: int) -> None:
        """Every rank, after rank 0's `begin`. Raises RunDirectoryError where this rank sees another file system."""
        try:
            (self._probe_dir / str(rank)).touch(exist_ok=False)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise RunDirectoryError(
                    f"{self._run_dir} is not the directory that rank 0 sees there; the run directory must be on a file "
                    "system that all ranks share"
                ) from error
            raise RunDirectoryError(f"cannot write in the run directory {self._run_dir}: {error.strerror}") from error

    def end(self, world_size: int) -> None:
        """Rank 0, after every rank took part. Raises RunDirectoryError naming ranks whose file did not arrive here."""
        present = {path.name for path in self._probe_dir.iterdir()}
        absent = [str(rank) for rank in range(world_size) if str(rank) not in present]
        if absent:
            raise RunDirectoryError(
                f"what ranks {', '.join(absent[:16])} write to {self._run_dir} does not reach rank 0; the run "
                "directory must be on a file system that all ranks share"
            )

    def remove(self) -> None:
        """Rank 0: leave nothing behind, however far the probe came."""
        remove_tree(self._probe_dir)
