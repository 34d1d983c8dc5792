"""Byte identity: an export from N ranks is, file by file, what save_pretrained of the unsharded model writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillframe.testing import run_ranks
from tests.multirank.exports import MODELS, build, digests, export, reference

SIZES = ("50KB", "50GB")


def _source(name: str, origin: str, tmp_path: Path) -> Path | None:
    if origin == "from_config":
        return None
    source_dir = tmp_path / "source"
    build(name, None).save_pretrained(source_dir)
    return source_dir


def _assert_identical(run_dir: Path, name: str, source_dir: Path | None, tmp_path: Path) -> None:
    for size in SIZES:
        reference_dir = tmp_path / f"reference-{size}"
        reference(reference_dir, name, source_dir, size)
        expected, saved = digests(reference_dir), digests(run_dir / size / "hf-7")
        assert saved.pop("stillframe.json")
        assert saved == expected
        weights = [file for file in expected if file.endswith(".safetensors")]
        assert (len(weights) > 1) == (size == "50KB")
        assert ("model.safetensors.index.json" in expected) == (size == "50KB")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("origin", ["from_config", "reloaded"])
@pytest.mark.parametrize("name", MODELS)
def test_fsdp_export_equals_save_pretrained(name: str, origin: str, world_size: int, tmp_path: Path) -> None:
    source_dir = _source(name, origin, tmp_path)
    results = run_ranks(world_size, export, tmp_path / "run", name, source_dir, "fsdp", SIZES)
    _assert_identical(tmp_path / "run", name, source_dir, tmp_path)
    assert all(is_sharded for result in results for _, is_sharded in result)


@pytest.mark.parametrize("how", ["ddp", "replicated"])
@pytest.mark.parametrize("name", MODELS)
def test_replicated_export_equals_save_pretrained_and_is_split_fairly(name: str, how: str, tmp_path: Path) -> None:
    results = run_ranks(3, export, tmp_path / "run", name, None, how, SIZES)
    _assert_identical(tmp_path / "run", name, None, tmp_path)
    staged = [result[0][0] for result in results]
    # Headers go whole to one rank or another; with weights this tiny they weigh some percent of a share.
    headers = sum(_header_bytes(path) for path in (tmp_path / "run" / SIZES[0] / "hf-7").glob("*.safetensors"))
    assert max(staged) - min(staged) <= headers + 128
    assert sum(staged) == sum(p.stat().st_size for p in (tmp_path / "run" / SIZES[0] / "hf-7").glob("*.safetensors"))


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
