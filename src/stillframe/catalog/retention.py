"""Which checkpoints are superseded, and their removal."""

from __future__ import annotations

from collections.abc import Sequence

from stillframe.catalog.directory import CatalogEntry
from stillframe.durable import retire
from stillframe.names import retired_path


def superseded(entries: Sequence[CatalogEntry], *, keep: int | None) -> tuple[CatalogEntry, ...]:
    """All but the `keep` newest of `entries`, which are in order of publication. None keeps all; the newest stays."""
    if keep is None:
        return ()
    return tuple(entries[: max(len(entries) - max(keep, 1), 0)])


def remove(entry: CatalogEntry, *, attempt: str) -> None:
    """Delete a published checkpoint: it disappears by one durable rename, then its files go. Raises OSError."""
    retire(entry.path, retired_path(entry.path.parent, entry.kind, entry.step, attempt))
