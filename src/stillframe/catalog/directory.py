"""Listing the published checkpoints of a run, and the links to the newest of them."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from stillframe.durable import replace_link
from stillframe.errors import LoadError, NotACheckpoint
from stillframe.manifest import read_manifest
from stillframe.names import (
    CHECKPOINT_PART,
    EXPORT_PART,
    KINDS,
    MANIFEST_NAME,
    TOGETHER,
    latest_path,
    parse_published,
)
from stillframe.records import CatalogEntry

FAMILIES = {"hf": ("hf", TOGETHER), "checkpoint": ("checkpoint", TOGETHER), "snapshot": ("snapshot",)}
"""What has a link to its newest and a rule of retention, and the kinds that count in it. `step-<N>` counts twice."""
EXPORTS = FAMILIES["hf"]
"""The kinds that hold a Hugging Face directory: `export_dir`."""
RESUMABLE = ("checkpoint", "snapshot", TOGETHER)
"""The kinds that hold a place to resume from: `checkpoint_dir`."""

_REMEMBERED_MANIFESTS = 4096


def list_checkpoints(run_dir: Path, *kinds: str) -> tuple[CatalogEntry, ...]:
    """The published checkpoints in `run_dir`, oldest publication first; of these `kinds` if any are given.

    Only what is recognised whole counts: a directory of the right name that holds a valid manifest of that kind and
    step. Anything else of that name (made by hand, by another tool) is left alone by everything that uses this list.
    Whether the files that the manifest lists are still there is not looked at: `damage` does.

    A manifest is decoded once per process and version of the file: listing again costs a look at each directory.
    Raises NotACheckpoint if `run_dir` is not a directory.
    """
    if not run_dir.is_dir():
        raise NotACheckpoint(f"{run_dir} is not a directory")
    entries = []
    for path in run_dir.iterdir():
        parsed = parse_published(path.name)
        if parsed is None or (kinds and parsed[0] not in kinds) or path.is_symlink():
            continue
        listed = _look_at(path)
        if listed is not None and (listed.entry.kind, listed.entry.step) == parsed:
            entries.append(listed.entry)
    return tuple(sorted(entries, key=lambda entry: (entry.sequence, entry.step, entry.kind)))


def newest(run_dir: Path, *kinds: str) -> CatalogEntry | None:
    """The checkpoint of these `kinds` (any, if none is given) that was published last; None if there is none.

    `newest(run_dir, *RESUMABLE)` is where to go on from, `newest(run_dir, *EXPORTS)` the newest export.
    """
    entries = list_checkpoints(run_dir, *kinds)
    return entries[-1] if entries else None


def next_sequence(run_dir: Path) -> int:
    """The `sequence` of the next publication: one above that of whatever kind and branch was published last."""
    return 1 + max((entry.sequence for entry in list_checkpoints(run_dir)), default=0)


def steps_by_kind(entries: Iterable[CatalogEntry]) -> dict[str, tuple[int, ...]]:
    """The steps of `entries`, ascending, for every kind there is."""
    entries = tuple(entries)
    return {kind: tuple(sorted(entry.step for entry in entries if entry.kind == kind)) for kind in KINDS}


def point_to_newest(run_dir: Path, kind: str, attempt: str) -> None:
    """Have the links that a checkpoint of `kind` may be the newest for name the newest there is, if any; durable.

    `hf-latest` leads to `hf-<N>` or `step-<N>/hf`, `checkpoint-latest` to `checkpoint-<N>` or `step-<N>/checkpoint`,
    `snapshot-latest` to `snapshot-<N>`. Raises FileExistsError if something that is no link has its name, and OSError.
    """
    for family, kinds in FAMILIES.items():
        entry = newest(run_dir, *kinds) if kind in kinds else None
        if entry is None:
            continue
        place = checkpoint_dir if family != "hf" else export_dir
        target = str(place(entry).relative_to(run_dir))
        link = latest_path(run_dir, family)
        if not (link.is_symlink() and str(link.readlink()) == target):
            replace_link(link, target, attempt)


def checkpoint_dir(entry: CatalogEntry) -> Path:
    """The directory of `entry` to resume from, in the DCP format. Raises NotACheckpoint for an export."""
    if entry.kind not in RESUMABLE:
        raise NotACheckpoint(f"{entry.path} is an export, from which no run can be resumed")
    return entry.path / CHECKPOINT_PART if entry.kind == TOGETHER else entry.path


def export_dir(entry: CatalogEntry) -> Path:
    """The Hugging Face directory of `entry`. Raises NotACheckpoint for a checkpoint or snapshot."""
    if entry.kind not in EXPORTS:
        raise NotACheckpoint(f"{entry.path} is a {entry.kind}, not an export")
    return entry.path / EXPORT_PART if entry.kind == TOGETHER else entry.path


def damage(entry: CatalogEntry) -> str | None:
    """What has happened to a listed checkpoint since it was published; None if it is whole.

    Whole: it is still the checkpoint of the list, and every file of its manifest is a regular file of its size. What
    is in the files is not read.
    """
    listed = _look_at(entry.path)
    if listed is None:
        return "it is gone, or its manifest is not valid any more"
    if listed.entry != entry:
        return "it has been replaced by another"
    for name, size in listed.file_sizes:
        try:
            # Not through links: what a link leads to may be in the very directory that would be deleted.
            status = (entry.path / name).lstat()
        except (OSError, ValueError) as error:
            return f"{name!r} cannot be found ({error})"
        if not stat.S_ISREG(status.st_mode):
            return f"{name!r} is not a regular file"
        if status.st_size != size:
            return f"{name!r} has {status.st_size} bytes, not {size}"
    return None


@dataclass(frozen=True, slots=True)
class _Listed:
    """What is remembered of a manifest; its tensors, the bulk of it, are not."""

    entry: CatalogEntry
    file_sizes: tuple[tuple[str, int], ...]


def _look_at(path: Path) -> _Listed | None:
    """What the directory `path` is by its manifest, None if it has no valid one."""
    try:
        status = (path / MANIFEST_NAME).stat()
        if not stat.S_ISREG(status.st_mode):  # reading a FIFO would wait for ever
            return None
        return _decoded(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    except (OSError, LoadError):
        return None


@lru_cache(maxsize=_REMEMBERED_MANIFESTS)
def _decoded(path: Path, version: tuple[int, ...]) -> _Listed:
    """The manifest in `path`; `version` tells one file of that name from another. What raises is not remembered."""
    manifest = read_manifest(path)
    entry = CatalogEntry(
        path=path,
        kind=manifest.kind,
        step=manifest.step,
        sequence=manifest.sequence,
        world_size=manifest.world_size,
        size_bytes=manifest.size_bytes,
        published_at=manifest.published_at,
        branch=manifest.branch,
        metrics={name: value for name, value in manifest.metrics.items() if math.isfinite(value)},
    )
    return _Listed(entry, tuple((name, file.size) for name, file in manifest.files.items()))
