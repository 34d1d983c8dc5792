"""`verify`: whole directories pass, and every kind of damage is named: the file, the tensor, where, how much."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stillframe
from stillframe.errors import CorruptCheckpoint, NotACheckpoint
from stillframe.load import verifying
from stillframe.manifest import read_manifest
from stillframe.testing import models


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf-1 in several files, checkpoint-2, step-3 with both."""
    directory = tmp_path_factory.mktemp("run")
    model = models.tiny_qwen3()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with stillframe.Checkpointer(
        directory, model=model, optimizer=optimizer, max_shard_size="100KB", publish_together=True
    ) as ckpt:
        ckpt.save_hf(1)
        ckpt.save(2)
        ckpt.save_both(3)
    return directory


NAMES = ("hf-1", "checkpoint-2", "step-3")


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(run_dir / name, tmp_path / name))

    return copy


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def damage(directory: Path) -> str:
    with pytest.raises(CorruptCheckpoint) as raised:
        stillframe.verify(directory)
    return str(raised.value)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_published_is_whole(run_dir: Path, name: str) -> None:
    found = stillframe.verify(run_dir / name)
    manifest = read_manifest(run_dir / name)
    assert (found.path, found.files) == (run_dir / name, len(manifest.files))
    assert (found.tensors, found.bytes_read) == (len(manifest.tensors), manifest.size_bytes)
    assert found.tensors > 10


def test_by_its_link_and_by_its_parts(run_dir: Path) -> None:
    parts = [stillframe.verify(run_dir / "step-3" / part) for part in ("hf", "checkpoint")]
    links = [stillframe.verify(run_dir / f"{kind}-latest") for kind in ("hf", "checkpoint")]
    assert [replace(link, path=part.path) for link, part in zip(links, parts, strict=True)] == parts
    assert sum(part.files for part in parts) == len(read_manifest(run_dir / "step-3").files)
    assert all(part.tensors > 10 for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_anywhere_is_found(copied: Callable[[str], Path], name: str) -> None:
    """The first, a middle and the last byte of every file: headers, envelopes, tensors, configs."""
    directory = copied(name)
    for file, entry in read_manifest(directory).files.items():
        for offset in sorted({0, entry.size // 2, entry.size - 1} if entry.size else ()):
            flip(directory / file, offset)
            message = damage(directory)
            assert f"1 of {len(read_manifest(directory).files)} files" in message
            assert f"{file} was changed" in message
            flip(directory / file, offset)
    assert stillframe.verify(directory).files


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_named_by_tensor_and_offset(copied: Callable[[str], Path], name: str) -> None:
    directory = copied(name)
    tensors = read_manifest(directory).tensors
    file = Counter(entry.file for entry in tensors.values()).most_common(1)[0][0]
    there = sorted((entry.offset, entry.size, name) for name, entry in tensors.items() if entry.file == file)
    for offset, size, _ in there[-3:]:
        flip(directory / file, offset + size - 1)
    offset, size, first = there[-3]
    assert f"{file} was changed in {first!r}, bytes {offset} to {offset + size}, and 2 more of its tensors" in damage(
        directory
    )


def test_a_range_is_the_same_in_pieces(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(verifying, "_BUFFER_BYTES", 300)
    directory = copied("hf-1")
    assert stillframe.verify(directory).bytes_read == read_manifest(directory).size_bytes
    name, entry = max(read_manifest(directory).tensors.items(), key=lambda pair: pair[1].size)
    assert entry.size > 3000
    flip(directory / entry.file, entry.offset + 1500)
    assert f"was changed in {name!r}" in damage(directory)


@pytest.mark.parametrize("name", NAMES)
def test_all_files_that_are_gone_or_of_another_size_are_listed(copied: Callable[[str], Path], name: str) -> None:
    directory = copied(name)
    files = read_manifest(directory).files
    gone, short, long = sorted(files, key=lambda file: files[file].size)[-3:]
    (directory / gone).unlink()
    with (directory / short).open("r+b") as file:
        file.truncate(files[short].size - 1)
    with (directory / long).open("ab") as file:
        file.write(b"x")
    message = damage(directory)
    assert f"3 of {len(files)} files are not what was published" in message
    assert f"{gone} is missing" in message
    assert f"{short} is truncated: {files[short].size - 1} bytes, published with {files[short].size}" in message
    assert f"{long} has grown: {files[long].size + 1} bytes" in message


def test_a_link_in_place_of_a_file_is_not_followed(copied: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copied("hf-1")
    (directory / "config.json").rename(tmp_path / "config.json")
    (directory / "config.json").symlink_to(tmp_path / "config.json")
    assert "links are not followed" in damage(directory)


def edited(directory: Path, edit: Callable[[dict], None]) -> Path:  # type: ignore[type-arg]
    path = directory / "stillframe.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))
    return directory


def test_a_manifest_that_points_outside_is_refused(copied: Callable[[str], Path]) -> None:
    def add(fields: dict) -> None:  # type: ignore[type-arg]
        fields["files"]["../hf-1/config.json"] = fields["files"]["config.json"]

    assert "../hf-1/config.json is outside of the directory" in damage(edited(copied("hf-1"), add))


def test_a_manifest_whose_tensors_overlap_is_refused(copied: Callable[[str], Path]) -> None:
    def double(fields: dict) -> None:  # type: ignore[type-arg]
        name = next(iter(fields["tensors"]))
        fields["tensors"]["another"] = fields["tensors"][name]

    assert "overlaps what is before it" in damage(edited(copied("hf-1"), double))


def test_a_manifest_that_lacks_a_tensor_disagrees_with_the_header(copied: Callable[[str], Path]) -> None:
    def drop(fields: dict) -> None:  # type: ignore[type-arg]
        del fields["tensors"]["model.norm.weight"]

    message = damage(edited(copied("hf-1"), drop))
    assert "'model.norm.weight' is at (offset, bytes)" in message
    assert "None by" in message


def test_without_a_manifest_there_is_nothing_to_compare_with(copied: Callable[[str], Path]) -> None:
    directory = copied("hf-1")
    (directory / "stillframe.json").unlink()
    with pytest.raises(NotACheckpoint, match=r"has no stillframe\.json, which alone says what was published"):
        stillframe.verify(directory)


# load_hf(verify=True)


def test_a_verified_load_names_every_changed_tensor_and_changes_nothing(copied: Callable[[str], Path]) -> None:
    directory = copied("hf-1")
    model = models.tiny_qwen3()
    tensors = read_manifest(directory).tensors
    names = ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"]
    stillframe.load_hf(directory, model, verify=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in names:
        flip(directory / tensors[name].file, tensors[name].offset + 3)
    with pytest.raises(CorruptCheckpoint) as raised:
        stillframe.load_hf(directory, model, verify=True)
    assert "2 tensors are not what was published" in str(raised.value)
    for name in names:
        place = tensors[name]
        assert f"{name!r}, bytes {place.offset} to {place.offset + place.size} of {place.file}" in str(raised.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    stillframe.load_hf(directory, model)  # it is not compared unless asked for
    assert not torch.equal(before["model.norm.weight"], model.state_dict()["model.norm.weight"])


def test_a_load_cannot_be_verified_without_a_manifest(copied: Callable[[str], Path]) -> None:
    directory = copied("hf-1")
    (directory / "stillframe.json").unlink()
    with pytest.raises(NotACheckpoint, match=r"has no stillframe\.json"):
        stillframe.load_hf(directory, models.tiny_qwen3(), verify=True)


def test_an_export_that_was_published_with_a_checkpoint_is_compared_with_the_manifest_of_both(
    copied: Callable[[str], Path],
) -> None:
    directory = copied("step-3") / "hf"
    with (directory / sorted(p.name for p in directory.glob("*.safetensors"))[0]).open("ab") as file:
        file.write(b"12345678")
    with pytest.raises(CorruptCheckpoint, match="has grown"):
        stillframe.load_hf(directory, models.tiny_qwen3())


def test_a_verified_load_of_fp8_compares_the_scales_too(tmp_path: Path) -> None:
    model = models.tiny_qwen3()
    with stillframe.Checkpointer(tmp_path, model=model, save_dtype="fp8") as ckpt:
        directory = ckpt.save_hf(1)
    stillframe.load_hf(directory, model, verify=True)
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    place = read_manifest(directory).tensors[name]
    flip(directory / place.file, place.offset)
    with pytest.raises(CorruptCheckpoint, match=f"1 tensors are not what was published: '{name}'"):
        stillframe.load_hf(directory, model, verify=True)
