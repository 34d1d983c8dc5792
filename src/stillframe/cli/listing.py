"""What `stillframe list` prints: one line per published checkpoint, or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from stillframe.catalog.directory import list_checkpoints
from stillframe.records import CatalogEntry

HEADER = ("CHECKPOINT", "KIND", "STEP", "SIZE", "RANKS", "PUBLISHED", "BRANCH", "METRICS")


def format_checkpoints(run_dir: Path) -> str:
    """A table of the checkpoints of `run_dir`, oldest publication first, or a line that says there are none.

    Times are local, with their distance from UTC. Branch and metrics have columns where any checkpoint has them.
    Raises `NotACheckpoint` if there is no such directory.
    """
    entries = list_checkpoints(run_dir)
    if not entries:
        return f"no checkpoints in {run_dir}\n"
    rows = [HEADER, *map(_row, entries)]
    widths = [max(len(row[column]) for row in rows[1:]) for column in range(len(HEADER))]
    shown = [(column, max(width, len(HEADER[column]))) for column, width in enumerate(widths) if width > 0]
    return "".join("  ".join(row[column].ljust(width) for column, width in shown).rstrip() + "\n" for row in rows)


def checkpoints_as_json(run_dir: Path) -> str:
    """The same as a JSON array, for programs: sizes in bytes, times as in the manifests. Raises `NotACheckpoint`."""
    return json.dumps([_fields(entry) for entry in list_checkpoints(run_dir)], indent=1) + "\n"


def _fields(entry: CatalogEntry) -> dict[str, object]:
    return {
        "name": entry.path.name,
        "path": str(entry.path.absolute()),
        "kind": entry.kind,
        "step": entry.step,
        "branch": entry.branch,
        "sequence": entry.sequence,
        "published_at": entry.published_at,
        "world_size": entry.world_size,
        "size_bytes": entry.size_bytes,
        "metrics": dict(entry.metrics),
    }


def _row(entry: CatalogEntry) -> tuple[str, ...]:
    return (
        entry.path.name,
        entry.kind,
        str(entry.step),
        format_size(entry.size_bytes),
        str(entry.world_size),
        local_time(entry.published_time),
        printable(entry.branch),
        format_metrics(entry.metrics),
    )


def local_time(time: datetime | None) -> str:
    """A time with its distance from UTC, or "unknown"."""
    try:
        return f"{time.astimezone():%Y-%m-%d %H:%M:%S %z}" if time else "unknown"
    except (ValueError, OverflowError):  # the first or the last days that there are, which may not exist here
        return "unknown"


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Metrics in the order of their names: "accuracy=0.5 loss=1.234"."""
    return " ".join(f"{printable(name)}={value:.6g}" for name, value in sorted(metrics.items()))


def format_size(size_bytes: int) -> str:
    """A size in decimal units, as Transformers and disks count them: "12.3 MB"."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def printable(text: str) -> str:
    """A name as it is, unless a terminal would take part of it for something else."""
    return text if text.isprintable() else ascii(text)
