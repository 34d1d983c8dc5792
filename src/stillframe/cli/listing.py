"""What `stillframe list` prints: one line per published checkpoint."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from stillframe.catalog.directory import list_checkpoints

HEADER = ("CHECKPOINT", "KIND", "STEP", "SIZE", "RANKS", "PUBLISHED")


def format_checkpoints(run_dir: Path) -> str:
    """A table of the checkpoints of `run_dir`, oldest publication first, or a line that says there are none.

    Raises `NotACheckpoint` if there is no such directory.
    """
    entries = list_checkpoints(run_dir)
    if not entries:
        return f"no checkpoints in {run_dir}\n"
    rows = [HEADER]
    for entry in entries:
        published = f"{datetime.fromisoformat(entry.published_at).astimezone():%Y-%m-%d %H:%M:%S}"
        size = format_size(entry.size_bytes)
        rows.append((entry.path.name, entry.kind, str(entry.step), size, str(entry.world_size), published))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def format_size(size_bytes: int) -> str:
    """A size in decimal units, as Transformers and disks count them: "12.3 MB"."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
