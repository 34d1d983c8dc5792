"""Published checkpoints made by hand, for tests of what reads a run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stillframe.manifest import FileEntry, Manifest, encode_manifest
from stillframe.names import MANIFEST_NAME, TOGETHER, published_path

PUBLISHED_AT = "2026-01-02T03:04:05.678+00:00"


def add_checkpoint(
    run_dir: Path,
    step: int,
    *,
    sequence: int,
    kind: str = "hf",
    directory: Path | None = None,
    branch: str = "",
    metrics: Mapping[str, float] | None = None,
    published_at: str = PUBLISHED_AT,
) -> Path:
    """A checkpoint of `step`, under its own name or as `directory`, with files of 2 bytes beside the manifest."""
    directory = published_path(run_dir, kind, step) if directory is None else directory
    directory.mkdir()
    files = ("hf/config.json", "checkpoint/.metadata") if kind == TOGETHER else ("config.json",)
    for name in files:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"{}")
    manifest = Manifest(
        kind=kind,
        step=step,
        attempt=f"0123456789abcdef.{sequence}",
        sequence=sequence,
        world_size=2,
        layout_digest="d" * 64,
        published_at=published_at,
        git_commit=None,
        versions={},
        balance=1.0,
        files={name: FileEntry(size=2, crc64nvme="0" * 16) for name in files},
        tensors={},
        branch=branch,
        metrics=dict(metrics or {}),
    )
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return directory
