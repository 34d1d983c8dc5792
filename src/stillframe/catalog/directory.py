"""Listing the published checkpoints of a run, and the links to the newest of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stillframe.durable import replace_link
from stillframe.errors import LoadError, NotACheckpoint
from stillframe.manifest import read_manifest
from stillframe.names import KINDS, latest_path, parse_published


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A published checkpoint. Entries order by `sequence`, the order of publication, not by step."""

    path: Path
    kind: str
    step: int
    sequence: int
    world_size: int
    size_bytes: int
    published_at: str


def list_checkpoints(run_dir: Path, kind: str | None = None) -> tuple[CatalogEntry, ...]:
    """The published checkpoints in `run_dir`, oldest publication first; of one `kind` if given.

    Only what is recognised whole counts: a directory of the right name that holds a valid manifest of that kind and
    step. Anything else of that name (made by hand, by another tool) is left alone by everything that uses this list.
    Raises NotACheckpoint if `run_dir` is not a directory.
    """
    if not run_dir.is_dir():
        raise NotACheckpoint(f"{run_dir} is not a directory")
    entries = []
    for path in run_dir.iterdir():
        parsed = parse_published(path.name)
        if parsed is None or (kind is not None and parsed[0] != kind) or path.is_symlink():
            continue
        try:
            manifest = read_manifest(path)
        except LoadError:
            continue
        if (manifest.kind, manifest.step) != parsed:
            continue
        entries.append(
            CatalogEntry(
                path=path,
                kind=manifest.kind,
                step=manifest.step,
                sequence=manifest.sequence,
                world_size=manifest.world_size,
                size_bytes=manifest.size_bytes,
                published_at=manifest.published_at,
            )
        )
    return tuple(sorted(entries, key=lambda entry: (entry.sequence, entry.step)))


def latest_checkpoint(run_dir: Path, kind: str) -> CatalogEntry | None:
    """The checkpoint of `kind` that was published last, None if there is none."""
    entries = list_checkpoints(run_dir, kind)
    return entries[-1] if entries else None


def steps_by_kind(entries: Iterable[CatalogEntry]) -> dict[str, tuple[int, ...]]:
    """The steps of `entries`, ascending, for every kind there is."""
    entries = tuple(entries)
    return {kind: tuple(sorted(entry.step for entry in entries if entry.kind == kind)) for kind in KINDS}


def next_sequence(run_dir: Path) -> int:
    """The sequence of the next publication: kinds share one count, so that the newest of several can be told."""
    return 1 + max((entry.sequence for entry in list_checkpoints(run_dir)), default=0)


def point_to_newest(run_dir: Path, kind: str, attempt: str) -> None:
    """Have the link `<kind>-latest` name the checkpoint of `kind` that was published last, if there is any; durable.

    Raises FileExistsError if something that is no link has its name, and OSError.
    """
    newest = latest_checkpoint(run_dir, kind)
    link = latest_path(run_dir, kind)
    if newest is not None and not (link.is_symlink() and str(link.readlink()) == newest.path.name):
        replace_link(link, newest.path.name, attempt)
