"""The manifest, `stillframe.json`: what a published checkpoint consists of, and where it comes from.

It is the last file written into a checkpoint before it is published, so a directory with a valid manifest is whole.
Format version 1; unknown fields are ignored by readers, unknown versions refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillframe.errors import CorruptCheckpoint, NotACheckpoint
from stillframe.names import MANIFEST_NAME

FORMAT = "stillframe-manifest/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the checkpoint. `crc64nvme`: 16 hex digits of the CRC64-NVME of the whole file."""

    size: int
    crc64nvme: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor: its file, the offset of its first byte there, its size in bytes, and the CRC64-NVME of those bytes."""

    file: str
    offset: int
    size: int
    crc64nvme: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `stillframe.json` says.

    `sequence` counts the run's publications: the newest checkpoint is the one with the highest sequence, not the one
    with the highest step (a run resumed from an earlier step publishes lower steps later). `balance` is the
    largest rank's bytes divided by the mean. `published_at` is UTC, ISO 8601. `git_commit` is that of the working
    directory of rank 0 when the Checkpointer was made, with "-dirty" appended where it had changes; None outside a
    repository.
    """

    kind: str
    step: int
    attempt: str
    sequence: int
    world_size: int
    layout_digest: str
    published_at: str
    git_commit: str | None
    versions: dict[str, str]
    balance: float
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @property
    def size_bytes(self) -> int:
        """All files together, the manifest itself not counted."""
        return sum(entry.size for entry in self.files.values())


def encode_manifest(manifest: Manifest) -> bytes:
    return (json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, ensure_ascii=False) + "\n").encode()


def decode_manifest(content: bytes, path: Path) -> Manifest:
    """Raises CorruptCheckpoint, naming `path`, for anything that is not a whole manifest of a known version."""
    try:
        fields: dict[str, Any] = json.loads(content)
        version = fields["format"]
        if version != FORMAT:
            raise CorruptCheckpoint(f"{path}: format {version!r} is not known to this version of stillframe ({FORMAT})")
        return Manifest(
            kind=_typed(fields, "kind", str),
            step=_typed(fields, "step", int),
            attempt=_typed(fields, "attempt", str),
            sequence=_typed(fields, "sequence", int),
            world_size=_typed(fields, "world_size", int),
            layout_digest=_typed(fields, "layout_digest", str),
            published_at=_typed(fields, "published_at", str),
            git_commit=None if fields["git_commit"] is None else _typed(fields, "git_commit", str),
            versions=dict(_typed(fields, "versions", dict)),
            balance=float(fields["balance"]),
            files={
                name: FileEntry(size=_typed(e, "size", int), crc64nvme=_typed(e, "crc64nvme", str))
                for name, e in _typed(fields, "files", dict).items()
            },
            tensors={
                name: TensorEntry(
                    file=_typed(e, "file", str),
                    offset=_typed(e, "offset", int),
                    size=_typed(e, "size", int),
                    crc64nvme=_typed(e, "crc64nvme", str),
                )
                for name, e in _typed(fields, "tensors", dict).items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: is not a valid manifest ({type(error).__name__}: {error})") from error


def _typed(fields: Any, name: str, kind: type) -> Any:
    value = fields[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def read_manifest(checkpoint_dir: Path) -> Manifest:
    """The manifest of a published checkpoint. Raises NotACheckpoint if absent, CorruptCheckpoint if bad."""
    path = checkpoint_dir / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotACheckpoint(f"{checkpoint_dir} has no {MANIFEST_NAME}: not a checkpoint of stillframe") from error
    return decode_manifest(content, path)
