"""Which checkpoints are superseded, and their removal."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from stillframe.catalog.directory import CatalogEntry
from stillframe.durable import remove_tree, retire
from stillframe.names import is_retired, retired_path

_log = logging.getLogger("stillframe")


def superseded(entries: Sequence[CatalogEntry], *, keep: int | None) -> tuple[CatalogEntry, ...]:
    """All but the `keep` newest of `entries`, which are in order of publication. None keeps all; the newest stays."""
    if keep is None:
        return ()
    return tuple(entries[: max(len(entries) - max(keep, 1), 0)])


def remove(entry: CatalogEntry, *, attempt: str) -> None:
    """Delete a published checkpoint: it disappears by one durable rename, then its files go. Raises OSError."""
    retire(entry.path, retired_path(entry.path.parent, entry.kind, entry.step, attempt))


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed runs have left of checkpoints that they were deleting; what cannot be removed stays."""
    for path in run_dir.iterdir():
        if is_retired(path.name) and path.is_dir() and not path.is_symlink():
            try:
                remove_tree(path)
            except OSError as error:
                _log.warning("what is left of a deleted checkpoint cannot be removed: %s", error)
