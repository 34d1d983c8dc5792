"""The manifest, `stillframe.json`: what a published checkpoint consists of, and where it comes from.

It is the last file written into a checkpoint before it is published, so a directory with a valid manifest is whole.
Format version 1; unknown fields are ignored by readers, unknown versions refused.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stillframe.errors import CorruptCheckpoint, LoadError, NotACheckpoint
from stillframe.names import MANIFEST_NAME
from stillframe.records import Gathered, Reshuffled

FORMAT = "stillframe-manifest/1"

_CRC = re.compile("[0-9a-f]{16}")


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
    """What `stillframe.json` says; every count in it is at least 0, and every tensor lies inside of its file.

    `sequence` counts the run's publications: the newest checkpoint is the one with the highest sequence, not the one
    with the highest step (a run resumed from an earlier step publishes lower steps later). `balance` is the
    largest rank's bytes divided by the mean. `published_at` is UTC, ISO 8601. `git_commit` is that of the working
    directory of rank 0 when the Checkpointer was made, with "-dirty" appended where it had changes; None outside a
    repository. `branch` names the branch of the run, "" where there is only one; `metrics` are what the caller gave at
    the save, NaN where a number was not finite. `reshuffled` says that ranks exchanged tensors on the way, and
    `gathered` which keys one rank made of what several held; None that there are none. Manifests from before there were
    these four have none of them.
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
    branch: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    gathered: Gathered | None = None
    reshuffled: Reshuffled | None = None

    @property
    def size_bytes(self) -> int:
        """All files together, the manifest itself not counted."""
        return sum(entry.size for entry in self.files.values())


def encode_manifest(manifest: Manifest) -> bytes:
    fields = {"format": FORMAT, **asdict(manifest), "metrics": finite_metrics(manifest.metrics)}
    return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON can say them, which knows no NaN and no infinity: a checkpoint must not be lost to a loss."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def decode_metrics(fields: Mapping[str, object]) -> dict[str, float]:
    """The metrics that `finite_metrics` made this of; what was not finite is NaN. Raises ValueError."""
    metrics = {}
    for name, value in fields.items():
        if value is None:
            metrics[name] = math.nan
        # Compared before it is converted: an integer may be too large for a float. NaN compares false.
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            metrics[name] = float(value)
        else:
            raise ValueError(f"the metric {name!r:.60} is {value!r:.60}")
    return metrics


def decode_manifest(content: bytes, path: Path) -> Manifest:
    """Raises CorruptCheckpoint, naming `path`, for anything that is not a whole manifest of a known version."""
    try:
        fields: dict[str, Any] = json.loads(content)
        version = fields["format"]
        if version != FORMAT:
            raise CorruptCheckpoint(f"{path}: format {version!r} is not known to this version of stillframe ({FORMAT})")
        manifest = Manifest(
            kind=_typed(fields, "kind", str),
            step=_count(fields, "step"),
            attempt=_typed(fields, "attempt", str),
            sequence=_count(fields, "sequence"),
            world_size=_count(fields, "world_size"),
            layout_digest=_typed(fields, "layout_digest", str),
            published_at=_typed(fields, "published_at", str),
            git_commit=None if fields["git_commit"] is None else _typed(fields, "git_commit", str),
            versions={name: _typed(fields["versions"], name, str) for name in _typed(fields, "versions", dict)},
            balance=_ratio(fields, "balance"),
            files={name: FileEntry(size=_count(e, "size"), crc64nvme=_crc(e)) for name, e in _entries(fields, "files")},
            tensors={
                name: TensorEntry(
                    file=_typed(e, "file", str),
                    offset=_count(e, "offset"),
                    size=_count(e, "size"),
                    crc64nvme=_crc(e),
                )
                for name, e in _entries(fields, "tensors")
            },
            branch=_typed(fields, "branch", str) if "branch" in fields else "",
            metrics=decode_metrics(_typed(fields, "metrics", dict)) if "metrics" in fields else {},
            gathered=None if fields.get("gathered") is None else _gathered(_typed(fields, "gathered", dict)),
            reshuffled=None if fields.get("reshuffled") is None else _reshuffled(_typed(fields, "reshuffled", dict)),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: is not a valid manifest ({type(error).__name__}: {error})") from error
    for name, tensor in manifest.tensors.items():
        file = manifest.files.get(tensor.file)
        if file is None or tensor.offset + tensor.size > file.size:
            raise CorruptCheckpoint(
                f"{path}: tensor {name!r} is said to be {tensor.size} bytes at offset {tensor.offset} of "
                f"{tensor.file!r}, which {'is not listed' if file is None else f'has {file.size} bytes'}"
            )
    return manifest


def _typed(fields: Any, name: str, kind: type) -> Any:
    value = fields[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _count(fields: Any, name: str) -> int:
    value: int = _typed(fields, name, int)
    if value < 0:
        raise ValueError(f"{name} is {value}")
    return value


def _gathered(fields: Any) -> Gathered:
    keys = _typed(fields, "keys", list)
    if not all(isinstance(key, str) for key in keys):
        raise TypeError(f"gathered keys are {keys!r:.60}")
    return Gathered(keys=tuple(keys), bucket_bytes=_count(fields, "bucket_bytes"))


def _reshuffled(fields: Any) -> Reshuffled:
    return Reshuffled(
        tensors=_count(fields, "tensors"),
        size_bytes=_count(fields, "size_bytes"),
        bucket_bytes=_count(fields, "bucket_bytes"),
    )


def _ratio(fields: Any, name: str) -> float:
    value = fields[name]
    # Compared before it is converted: an integer may be too large for a float. NaN compares false.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10**9:
        raise ValueError(f"{name} is {value!r:.60}")
    return float(value)


def _crc(fields: Any) -> str:
    value: str = _typed(fields, "crc64nvme", str)
    if _CRC.fullmatch(value) is None:
        raise ValueError(f"crc64nvme is {value!r:.60}, not 16 hexadecimal digits")
    return value


def _entries(fields: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    entries: dict[str, Any] = _typed(fields, name, dict)
    for key in entries:
        _typed(entries, key, dict)
    return list(entries.items())


def read_manifest(checkpoint_dir: Path) -> Manifest:
    """The manifest of a published checkpoint.

    Raises NotACheckpoint if there is no such file, CorruptCheckpoint if it is bad, LoadError if it cannot be read.
    """
    path = checkpoint_dir / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise NotACheckpoint(f"{checkpoint_dir} has no {MANIFEST_NAME}: not a checkpoint of stillframe") from error
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror}") from error
    return decode_manifest(content, path)
