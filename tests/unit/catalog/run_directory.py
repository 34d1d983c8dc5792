"""Published checkpoints made by hand, for tests of what reads a run directory."""

from __future__ import annotations

from pathlib import Path

from stillframe.manifest import FileEntry, Manifest, encode_manifest
from stillframe.names import MANIFEST_NAME, published_path


def add_checkpoint(run_dir: Path, step: int, *, sequence: int, directory: Path | None = None) -> Path:
    """A checkpoint of `step`, under its own name or as `directory`, with one file beside the manifest."""
    directory = published_path(run_dir, "hf", step) if directory is None else directory
    directory.mkdir()
    (directory / "config.json").write_bytes(b"{}")
    manifest = Manifest(
        kind="hf",
        step=step,
        attempt=f"0123456789abcdef.{sequence}",
        sequence=sequence,
        world_size=2,
        layout_digest="d" * 64,
        published_at="2026-01-02T03:04:05.678+00:00",
        git_commit=None,
        versions={},
        balance=1.0,
        files={"config.json": FileEntry(size=2, crc64nvme="0" * 16)},
        tensors={},
    )
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return directory
