"""Which files are loaded, and every way in which a directory can be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stillframe.errors import CorruptCheckpoint, LoadError, NotACheckpoint
from stillframe.load.directory import INDEX_NAME, WEIGHTS_NAME, open_weights
from stillframe.load.folder import read_fully
from stillframe.manifest import FileEntry, Manifest, encode_manifest
from stillframe.names import MANIFEST_NAME

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def single(directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, directory / WEIGHTS_NAME)
    return directory


def sharded(directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, directory / SHARDS[0])
    save_file({"c": torch.ones(4)}, directory / SHARDS[1])
    write_index(directory, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_manifest(directory: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    manifest = Manifest(
        kind="hf",
        step=1,
        attempt="a",
        sequence=1,
        world_size=1,
        layout_digest="d",
        published_at="2025-01-01T00:00:00+00:00",
        git_commit=None,
        versions={},
        balance=1.0,
        files={name: FileEntry(size=size, crc64nvme="0" * 16) for name, size in sizes.items()},
        tensors={},
    )
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(manifest))


def found(directory: Path) -> dict[str, list[str]]:
    with open_weights(directory) as files:
        return {file.path.name: sorted(tensor.name for tensor in file.tensors) for file in files}


def test_a_single_file_is_found(tmp_path: Path) -> None:
    assert found(single(tmp_path / "m")) == {WEIGHTS_NAME: ["a", "b"]}


def test_the_files_of_an_index_are_found_and_others_are_left_alone(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "m")
    save_file({"x": torch.ones(1)}, directory / "adapter_model.safetensors")
    assert found(directory) == {SHARDS[0]: ["a", "b"], SHARDS[1]: ["c"]}


def test_an_index_that_names_the_single_file_is_no_contradiction(tmp_path: Path) -> None:
    directory = single(tmp_path / "m")
    write_index(directory, {"a": WEIGHTS_NAME, "b": WEIGHTS_NAME})
    assert found(directory) == {WEIGHTS_NAME: ["a", "b"]}


def test_files_that_are_links_are_followed_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    blobs = sharded(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    assert found(snapshot) == {SHARDS[0]: ["a", "b"], SHARDS[1]: ["c"]}


def test_a_link_to_a_directory_is_followed_once(tmp_path: Path) -> None:
    first, second = single(tmp_path / "hf-1"), sharded(tmp_path / "hf-2")
    latest = tmp_path / "hf-latest"
    latest.symlink_to(first.name)
    with open_weights(latest) as files:
        latest.unlink()
        latest.symlink_to(second.name)
        (file,) = files
        assert read_fully(file.path, file.descriptor, 0, file.size_bytes) == (first / WEIGHTS_NAME).read_bytes()


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "m")
    before = open_descriptors()
    found(directory)
    (directory / SHARDS[1]).unlink()
    with pytest.raises(CorruptCheckpoint):
        found(directory)
    assert open_descriptors() == before


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="hf-9: does not exist"):
        found(tmp_path / "hf-9")
    dangling = tmp_path / "hf-latest"
    dangling.symlink_to("hf-9")
    with pytest.raises(NotACheckpoint, match="hf-latest: does not exist"):
        found(dangling)


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    path = single(tmp_path / "m") / WEIGHTS_NAME
    with pytest.raises(NotACheckpoint, match="is not a directory"):
        found(path)


@pytest.mark.parametrize("name", [".hf-100.incomplete", ".hf-100.retired-abc"])
def test_a_hidden_directory_is_not_published_however_it_is_named(name: str, tmp_path: Path) -> None:
    single(tmp_path / name)
    with pytest.raises(NotACheckpoint, match="never published"):
        found(tmp_path / name)
    link = tmp_path / "hf-100"
    link.symlink_to(name)
    with pytest.raises(NotACheckpoint, match="never published"):
        found(link)


def test_the_current_directory_is_judged_by_its_real_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single(tmp_path / "m"))
    assert found(Path()) == {WEIGHTS_NAME: ["a", "b"]}
    monkeypatch.chdir(single(tmp_path / ".hf-1.incomplete"))
    with pytest.raises(NotACheckpoint, match="never published"):
        found(Path())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds neither model.safetensors nor model.safetensors.index.json$"),
        (["config.json"], "holds neither"),
        (["pytorch_model.bin"], "pickled weights are not loaded"),
        ([".metadata", "__0_0.distcp"], "torch.distributed.checkpoint directory"),
        (["consolidated.safetensors"], "but consolidated.safetensors, which is no name"),
    ],
)
def test_a_directory_without_weights_says_what_is_there_instead(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(NotACheckpoint, match=message):
        found(tmp_path)


def both(directory: Path) -> None:
    save_file({"a": torch.ones(2)}, directory / WEIGHTS_NAME)


def absent(directory: Path) -> None:
    (directory / SHARDS[1]).unlink()


def astray(directory: Path) -> None:
    write_index(directory, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1], "d": SHARDS[0]})


def twice(directory: Path) -> None:
    save_file({"c": torch.ones(4), "a": torch.ones(2)}, directory / SHARDS[1])


def truncated(directory: Path) -> None:
    os.truncate(directory / SHARDS[1], (directory / SHARDS[1]).stat().st_size - 1)


def longer(directory: Path) -> None:
    os.truncate(directory / SHARDS[1], (directory / SHARDS[1]).stat().st_size + 1)


def pipe(directory: Path) -> None:
    absent(directory)
    os.mkfifo(directory / SHARDS[1])


def subdirectory(directory: Path) -> None:
    absent(directory)
    (directory / SHARDS[1]).mkdir()


def outside(directory: Path) -> None:
    save_file({"c": torch.ones(4)}, directory.parent / "c.safetensors")
    write_index(directory, {"a": SHARDS[0], "b": SHARDS[0], "c": "../c.safetensors"})


def absolute(directory: Path) -> None:
    write_index(directory, {"a": SHARDS[0], "b": SHARDS[0], "c": str(directory / SHARDS[1])})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (both, "holds both model.safetensors and .*index.json.* Delete the stale one"),
        (absent, r"index\.json: names 1 files that do not exist: model-00002-of-00002\.safetensors"),
        (astray, r"names 2 keys that are not in the file it says: 'b' in model-00002.*, 'd' in model-00001"),
        (twice, r"'a' is in .*model-00001-of-00002\.safetensors too"),
        (truncated, r"model-00002-of-00002\.safetensors: .*; it is truncated"),
        (longer, r"model-00002-of-00002\.safetensors: .*bytes that belong to no tensor"),
        (pipe, r"model-00002-of-00002\.safetensors: is not a regular file"),
        (subdirectory, r"model-00002-of-00002\.safetensors: is not a regular file"),
        (outside, r"'c' is said to be in '\.\./c\.safetensors', which is outside"),
        (absolute, r"'c' is said to be in '/.*', which is outside"),
        (lambda d: write_index(d, {"a": ""}), "'a' is said to be in '', which is outside"),
        (lambda d: write_index(d, {"a": "x/../../y"}), "which is outside"),
        (lambda d: write_index(d, {"a": "nul\0"}), "which is outside"),
        (
            lambda d: write_index(d, {"a": "\ud800.safetensors"}),
            r"said to be in '\\ud800\.safetensors', which is outside",
        ),
        (lambda d: write_index(d, {"a": SHARDS[0], "b": SHARDS[0], "\ud800": SHARDS[1]}), r"'\\ud800' in model-00002"),
        (lambda d: write_index(d, {}), "has no weight_map"),
        (lambda d: write_index(d, []), "has no weight_map"),
        (lambda d: write_index(d, {"a": 3}), "has no weight_map"),
        (lambda d: (d / INDEX_NAME).write_text("[]"), "has no weight_map"),
        (lambda d: (d / INDEX_NAME).write_text('{"weight_map": '), "is not valid JSON"),
        (lambda d: (d / INDEX_NAME).write_bytes(b'{"\xff": 1}'), "is not valid JSON"),
        (lambda d: (d / INDEX_NAME).write_text("[" * 200_000), "is not valid JSON"),
    ],
)
def test_a_directory_that_contradicts_itself_is_refused(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    directory = sharded(tmp_path / "m")
    assert len(found(directory)) == 2
    spoil(directory)
    with pytest.raises(CorruptCheckpoint, match=message):
        found(directory)


def test_a_published_directory_is_as_its_manifest_says(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "hf-1")
    write_manifest(directory)
    assert len(found(directory)) == 2
    (directory / "notes.txt").write_text("added by somebody")
    assert len(found(directory)) == 2


def replaced(directory: Path) -> None:
    save_file({"c": torch.ones(400)}, directory / SHARDS[1])


def extended(directory: Path) -> None:
    save_file({"d": torch.ones(4)}, directory / "more.safetensors")
    write_index(directory, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], "d": "more.safetensors"})


def shortened(directory: Path) -> None:
    write_index(directory, {"a": SHARDS[0], "b": SHARDS[0]})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            replaced,
            r"not what was published: model-00002.* \((is truncated|has grown): has \d+ bytes, was published with \d+",
        ),
        (extended, r"more\.safetensors \(was not published\)"),
        (shortened, r"model-00002-of-00002\.safetensors \(was published, is not there or not in the index\)"),
        (lambda d: (d / MANIFEST_NAME).write_text("{}"), r"stillframe\.json: is not a valid manifest"),
    ],
)
def test_a_published_directory_that_was_changed_is_refused(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    directory = sharded(tmp_path / "hf-1")
    write_manifest(directory)
    spoil(directory)
    with pytest.raises(CorruptCheckpoint, match=message):
        found(directory)


def test_reading_past_the_end_is_an_error_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        assert read_fully(path, file.fileno(), 3, 4) == b"3456"
        with pytest.raises(CorruptCheckpoint, match="w: ends at byte 10, before byte 12"):
            read_fully(path, file.fileno(), 8, 4)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(LoadError, match=r"cannot read bytes 0 to 4: .*Is a directory"):
            read_fully(tmp_path, descriptor, 0, 4)
    finally:
        os.close(descriptor)
