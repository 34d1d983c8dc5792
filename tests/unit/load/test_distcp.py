"""What is read of a DCP directory, and every way in which one can be wrong."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stillframe.errors import CorruptCheckpoint, LoadError, ModelMismatch, NotACheckpoint
from stillframe.load.distcp import open_distcp
from stillframe.load.filling import Limits
from stillframe.manifest import FileEntry, Manifest, TensorEntry, encode_manifest
from stillframe.names import MANIFEST_NAME, rank_state_name
from stillframe.testing.playing import playing
from tests.unit.load.distcp_directories import (
    bits,
    change_metadata,
    flip,
    manifest_of,
    publish,
    read_metadata,
    save,
    save_chunks,
    write_metadata,
)

MATRIX = torch.arange(24.0).reshape(6, 4)
ROWS = [((0, 0), (3, 4)), ((3, 0), (3, 4))]
STEP = torch.tensor(7.0)


def two_ranks(directory: Path) -> Path:
    """`matrix` of which each rank has half, `step` that rank 0 has, an object, what each rank alone has, a config."""
    save_chunks(directory, {"matrix": (MATRIX, ROWS), "step": (STEP, [((), ())])}, objects={"lr": 0.5})
    (directory / "state").mkdir()
    for rank in range(2):
        torch.save({"rank": rank, "rng": torch.arange(5)}, directory / rank_state_name(rank))
    (directory / "train_state.json").write_text('{"step": 5}')
    return directory


def published(directory: Path) -> Path:
    publish(two_ranks(directory))
    return directory


def empty_targets() -> dict[str, torch.Tensor]:
    return {"matrix": torch.zeros(6, 4), "step": torch.tensor(0.0)}


def load(directory: Path, targets: dict[str, torch.Tensor] | None = None, **options: object) -> dict[str, torch.Tensor]:
    targets = empty_targets() if targets is None else targets
    with open_distcp(directory) as opened:
        opened.fill(targets, **options)
    return targets


def refused(directory: Path, *words: str, error: type[LoadError] = CorruptCheckpoint) -> None:
    """Loading raises exactly `error`, and its message has all the `words`."""
    with pytest.raises(error) as raised:
        load(directory)
    assert raised.type is error
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("make", [two_ranks, published])
def test_what_is_in_a_directory(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with open_distcp(make(tmp_path / "c")) as opened:
        assert opened.tensors.keys() == {"matrix", "step"}
        assert (opened.tensors["matrix"].dtype, opened.tensors["matrix"].shape) == (torch.float32, (6, 4))
        assert [(c.offsets, c.sizes) for c in opened.tensors["matrix"].chunks] == ROWS
        assert opened.objects == {"lr"}
        assert opened.paths == {"matrix": ("matrix",), "step": ("step",), "lr": ("lr",)}
        assert (opened.manifest is None) == (make is two_ranks)
        targets = empty_targets()
        assert opened.fill(targets) > 0
        assert torch.equal(targets["matrix"], MATRIX)
        assert torch.equal(targets["step"], STEP)
        assert opened.object("lr") == 0.5
        assert opened.rank_state(1)["rank"] == 1
        assert opened.read_checked("train_state.json") == b'{"step": 5}'
        with pytest.raises(KeyError):
            opened.object("matrix")


def test_a_model_and_its_optimizer_as_torch_saves_them(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    save(tmp_path / "c", {"model": model_state, "optimizer": optimizer_state})
    targets = {
        "model.weight": torch.zeros(4, 3),
        "model.bias": torch.nn.Parameter(torch.zeros(4)),
        **{
            f"optimizer.state.{name}.{part}": torch.zeros(shape if part != "step" else ())
            for name, shape in (("weight", (4, 3)), ("bias", (4,)))
            for part in ("step", "exp_avg", "exp_avg_sq")
        },
    }
    with open_distcp(tmp_path / "c") as opened:
        opened.fill(targets)
        assert opened.object("optimizer.param_groups.0.lr") == 0.25
        assert opened.object("optimizer.param_groups.0.betas") == (0.9, 0.999)
        assert opened.paths["optimizer.param_groups.0.lr"] == ("optimizer", "param_groups", 0, "lr")
    assert torch.equal(targets["model.weight"], model.weight)
    assert torch.equal(targets["model.bias"], model.bias)
    for name in ("weight", "bias"):
        for part, value in optimizer_state["state"][name].items():
            assert torch.equal(targets[f"optimizer.state.{name}.{part}"], value)


NAMES = (
    "bfloat16 bool complex64 complex128 float16 float32 float64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 "
    "float8_e5m2fnuz float8_e8m0fnu int8 int16 int32 int64 uint8 uint16 uint32 uint64"
)


def test_every_dtype(tmp_path: Path) -> None:
    raw = torch.arange(128, dtype=torch.uint8)
    dtypes = [getattr(torch, name) for name in NAMES.split()]
    values = {str(dtype): raw.view(dtype) if dtype != torch.bool else raw % 3 == 0 for dtype in dtypes}
    save_chunks(tmp_path / "c", {key: (value, [((0,), tuple(value.shape))]) for key, value in values.items()})
    targets = load(tmp_path / "c", {key: torch.zeros_like(raw).view(value.dtype) for key, value in values.items()})
    for key, value in values.items():
        assert torch.equal(bits(targets[key]), bits(value)), key


@pytest.mark.parametrize("limits", [Limits(), Limits(buffer_bytes=64, small_bytes=0)], ids=["small", "large"])
def test_tensors_that_were_not_row_major(limits: Limits, tmp_path: Path) -> None:
    values = {
        "transposed": MATRIX.t(),
        "columns": MATRIX[:, 1:3],
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "every other": torch.arange(20)[::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "empty": torch.zeros(0, 3),
        "channels last": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    save(tmp_path / "c", values)
    targets = {key: torch.full_like(value, -1, memory_format=torch.contiguous_format) for key, value in values.items()}
    load(tmp_path / "c", targets, limits=limits)
    for key, value in values.items():
        assert torch.equal(targets[key], value), key


def test_targets_that_are_not_contiguous(tmp_path: Path) -> None:
    target = torch.zeros(4, 6).t()
    load(published(tmp_path / "c"), {"matrix": target, "step": torch.tensor(0.0)})
    assert torch.equal(target, MATRIX)


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    values = torch.arange(100.0)
    save_chunks(tmp_path / "c", {"t": (values, [((i,), (1,)) for i in range(100)])}, files=100)
    before = open_descriptors()
    with open_distcp(tmp_path / "c") as opened:
        target = torch.zeros(100)
        opened.fill({"t": target})
        assert len(open_descriptors() - before) < 80
    assert torch.equal(target, values)
    assert open_descriptors() == before


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_files_in_folders_of_the_directory(tmp_path: Path) -> None:
    def move(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = f"a/b/{info.relative_path}"

    directory = two_ranks(tmp_path / "c")
    change_metadata(directory, move)
    (directory / "a/b").mkdir(parents=True)
    for path in directory.glob("*.distcp"):
        path.rename(directory / "a/b" / path.name)
    assert torch.equal(load(directory)["matrix"], MATRIX)
    (directory / "a").rename(tmp_path / "elsewhere")
    (directory / "a").symlink_to(tmp_path / "elsewhere")
    refused(directory, "a/b/__0_0.distcp", "links are not followed")


@pytest.mark.parametrize("own_names", [False, True])
def test_a_checkpoint_that_was_published_together_with_an_export(own_names: bool, tmp_path: Path) -> None:
    directory = two_ranks(tmp_path / "step-5" / "checkpoint")
    manifest = manifest_of(directory, prefix="checkpoint/")
    files = {**manifest.files, "hf/config.json": FileEntry(size=1, crc64nvme="0" * 16)}
    tensors = {f"checkpoint/{n}": e for n, e in manifest.tensors.items()} if own_names else manifest.tensors
    (tmp_path / "step-5" / MANIFEST_NAME).write_bytes(encode_manifest(replace(manifest, files=files, tensors=tensors)))
    with open_distcp(directory) as opened:
        assert opened.manifest is not None
    assert torch.equal(load(directory)["matrix"], MATRIX)
    flip(directory / "__0_0.distcp", opened.manifest.tensors["matrix@0,0"].offset)
    refused(directory, "__0_0.distcp", "'matrix'")
    refused(directory.parent, f"the checkpoint is in {directory}", error=NotACheckpoint)


@pytest.mark.parametrize(
    "name", [".checkpoint-5.incomplete", ".step-5.incomplete/checkpoint", ".step-5.complete-a/checkpoint"]
)
def test_what_was_never_published_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    directory = two_ranks(tmp_path / name)
    refused(directory, "never published", error=NotACheckpoint)
    (tmp_path / "latest").symlink_to(directory)
    refused(tmp_path / "latest", "never published", error=NotACheckpoint)


def test_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "does not exist", error=NotACheckpoint)
    refused(tmp_path, "has no .metadata", error=NotACheckpoint)
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path, "stillframe.load_hf", error=NotACheckpoint)
    unfinished = two_ranks(tmp_path / "c")
    (unfinished / ".metadata").unlink()
    refused(unfinished, "never came to an end", error=NotACheckpoint)


class Foreign:
    """Says that it was built."""

    built = False

    def __setstate__(self, state: object) -> None:
        Foreign.built = True


class Executed:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("foreign", "name"),
    [(Foreign, "test_distcp.Foreign"), (Executed, "posix.mkdir")],
)
def test_a_foreign_class_is_named_and_not_executed(
    foreign: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = two_ranks(tmp_path / "c")
    instance = foreign()
    vars(instance)["state"] = 1
    change_metadata(directory, lambda metadata: setattr(metadata, "planner_data", {"matrix": instance}))
    refused(directory, ".metadata", name, "nothing of it was imported or executed")
    assert not Foreign.built
    assert not (tmp_path / "executed").exists()


def _lose_place(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex("matrix", (3, 0))]


def _move_chunk(rows: int) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        chunk = ChunkStorageMetadata(torch.Size((rows, 0)), torch.Size((3, 4)))
        metadata.state_dict_metadata["matrix"].chunks[1] = chunk
        metadata.storage_data[MetadataIndex("matrix", (rows, 0))] = metadata.storage_data[
            MetadataIndex("matrix", (3, 0))
        ]

    return change


def _lose_chunk(metadata: Metadata) -> None:
    del metadata.state_dict_metadata["matrix"].chunks[0]


def _place(**fields: object) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in fields.items():
            setattr(metadata.storage_data[MetadataIndex("matrix", (3, 0))], name, value)

    return change


CHANGES: dict[str, tuple[Callable[[Metadata], None], tuple[str, ...]]] = {
    "a chunk in no file": (_lose_place, ("(3, 0)", "'matrix'", "lost in the save")),
    "a gap": (_lose_chunk, ("'matrix'", "leave a gap", "[0, 0]")),
    "an overlap": (_move_chunk(2), ("'matrix'", "do not tile its shape (6, 4)", "[2, 0]")),
    "a chunk outside": (_move_chunk(4), ("'matrix'", "do not tile its shape (6, 4)", "[3, 0]")),
    "an absolute path": (_place(relative_path="/etc/passwd"), ("'matrix'", "'/etc/passwd'", "outside")),
    "a path that leads out": (_place(relative_path="../c/__0_0.distcp"), ("'matrix'", "outside")),
    "no path": (_place(relative_path=""), ("'matrix'", "outside")),
    "an item behind the end": (_place(offset=100_000), ("__1_0.distcp", "'matrix'", "is truncated")),
    "a negative offset": (_place(offset=-1), ("'matrix'", "the offset")),
    "a length that is none": (_place(length="1"), ("'matrix'", "the length")),
    "no storage": (lambda m: setattr(m, "storage_data", None), ("storage_data",)),
    "no items": (lambda m: setattr(m, "state_dict_metadata", [1]), ("state_dict_metadata holds a list",)),
    "a strange item": (lambda m: m.state_dict_metadata.update(matrix=1), ("'matrix'", "TensorStorageMetadata")),
    "a strange way": (lambda m: m.planner_data.update(matrix=[1]), ("'matrix'", "planner_data")),
    "a negative size": (lambda m: setattr(m.state_dict_metadata["matrix"], "size", (-1, 4)), ("'matrix'",)),
    "an immense size": (lambda m: setattr(m.state_dict_metadata["matrix"], "size", (1 << 62, 4)), ("'matrix'",)),
    "fewer dimensions": (lambda m: setattr(m.state_dict_metadata["matrix"], "size", (24,)), ("'matrix'", "(24,)")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_metadata_that_contradicts_itself_or_the_files(change: str, tmp_path: Path) -> None:
    directory = two_ranks(tmp_path / "c")
    how, words = CHANGES[change]
    change_metadata(directory, how)
    refused(directory, str(directory), *words)


def test_metadata_that_cannot_be_read(tmp_path: Path) -> None:
    directory = two_ranks(tmp_path / "c")
    content = (directory / ".metadata").read_bytes()
    (directory / ".metadata").write_bytes(content[:-100])
    refused(directory, ".metadata", "ends")
    (directory / ".metadata").write_bytes(b"")
    refused(directory, ".metadata", "ends")
    write_metadata(directory, {"not": "metadata"})
    refused(directory, ".metadata", "instead of a Metadata")
    with (directory / ".metadata").open("r+b") as file:
        file.truncate(2_000_000_000)  # sparse: nothing of it may be allocated
    refused(directory, ".metadata", "2000000000 bytes")


def test_what_torch_stores_and_this_loader_does_not_read(tmp_path: Path) -> None:
    directory = two_ranks(tmp_path / "c")
    change_metadata(directory, _place(transform_descriptors=["stream.zstd"]))
    refused(directory, "'matrix'", "transformations", error=LoadError)


@pytest.mark.parametrize("make", [two_ranks, published])
def test_a_missing_file_is_named_with_its_rank_and_a_key(make: Callable[[Path], Path], tmp_path: Path) -> None:
    directory = make(tmp_path / "c")
    (directory / "__1_0.distcp").unlink()
    refused(directory, "__1_0.distcp", "rank 1", "'matrix'", "is missing", "load another checkpoint")


@pytest.mark.parametrize("make", [two_ranks, published])
def test_a_truncated_file_is_named(make: Callable[[Path], Path], tmp_path: Path) -> None:
    directory = make(tmp_path / "c")
    size = (directory / "__1_0.distcp").stat().st_size
    os.truncate(directory / "__1_0.distcp", size - 1)
    refused(directory, "__1_0.distcp", "is truncated", f"{size - 1} bytes", str(size))


def test_files_that_are_not_those_of_the_manifest(tmp_path: Path) -> None:
    directory = published(tmp_path / "c")
    with (directory / "__0_0.distcp").open("ab") as file:
        file.write(b"more")
    (directory / rank_state_name(1)).unlink()
    refused(directory, "__0_0.distcp has grown", "state/rank-00001.pt is missing")


def test_a_link_in_place_of_a_file(tmp_path: Path) -> None:
    directory = two_ranks(tmp_path / "c")
    shutil.move(directory / "__0_0.distcp", tmp_path / "elsewhere")
    (directory / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    refused(directory, "__0_0.distcp", "links are not followed")


def test_a_pipe_in_place_of_a_file(tmp_path: Path) -> None:
    directory = two_ranks(tmp_path / "c")
    (directory / "__0_0.distcp").unlink()
    os.mkfifo(directory / "__0_0.distcp")
    refused(directory, "__0_0.distcp", "is not a regular file")


def test_metadata_of_another_save_than_the_manifest(tmp_path: Path) -> None:
    directory = published(tmp_path / "c")
    flip(directory / ".metadata", -10)
    refused(directory, ".metadata", "was changed or damaged")


def _entry(manifest: Manifest, **fields: object) -> Manifest:
    entry = replace(manifest.tensors["matrix@3,0"], **fields)
    return replace(manifest, tensors={**manifest.tensors, "matrix@3,0": entry})


MANIFESTS: dict[str, tuple[Callable[[Manifest], Manifest], tuple[str, ...]]] = {
    "lacks a chunk": (
        lambda m: replace(m, tensors={n: e for n, e in m.tensors.items() if n != "step@"}),
        ("step@ is in .metadata only",),
    ),
    "has another chunk": (
        lambda m: replace(m, tensors={**m.tensors, "matrix@1,0": m.tensors["step@"]}),
        ("matrix@1,0 is in stillframe.json only",),
    ),
    "has it in another file": (lambda m: _entry(m, file="__0_0.distcp"), ("matrix@3,0", "outside of")),
    "has it elsewhere": (lambda m: _entry(m, offset=0, size=48, file="__0_0.distcp"), ("matrix@3,0",)),
    "has it at another size": (lambda m: _entry(m, size=44), ("matrix@3,0 has 44 bytes",)),
    "lacks a file": (
        lambda m: replace(
            m,
            files={n: e for n, e in m.files.items() if n != "__0_0.distcp"},
            tensors={n: e for n, e in m.tensors.items() if e.file != "__0_0.distcp"},
        ),
        ("__0_0.distcp was not published",),
    ),
    "lists a file outside": (
        lambda m: replace(m, files={**m.files, "../x": FileEntry(size=1, crc64nvme="0" * 16)}),
        ("'../x'", "outside"),
    ),
}


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_manifest_that_disagrees(change: str, tmp_path: Path) -> None:
    directory = published(tmp_path / "c")
    how, words = MANIFESTS[change]
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(how(manifest_of(directory))))
    refused(directory, str(directory), *words)


LARGE = Limits(buffer_bytes=16, small_bytes=0, long_piece_bytes=8)
BLOCKS = Limits(buffer_bytes=16, small_bytes=0)


@pytest.mark.parametrize("limits", [Limits(), LARGE, BLOCKS], ids=["together", "straight", "in blocks"])
@pytest.mark.parametrize("byte", [0, 47])
def test_a_flipped_bit_is_found_and_said_where(limits: Limits, byte: int, tmp_path: Path) -> None:
    directory = published(tmp_path / "c")
    load(directory, limits=limits)
    entry = manifest_of(directory).tensors["matrix@3,0"]
    flip(directory / "__1_0.distcp", entry.offset + byte)
    with pytest.raises(CorruptCheckpoint) as raised:
        load(directory, limits=limits)
    for word in ("__1_0.distcp", "'matrix'", "(3, 0)", f"bytes {entry.offset} to {entry.offset + 48}"):
        assert word in str(raised.value)
    changed = load(directory, verify=False, limits=limits)["matrix"]
    assert (changed != MATRIX).sum() == 1


@pytest.mark.parametrize("limits", [Limits(), LARGE, BLOCKS], ids=["together", "straight", "in blocks"])
def test_a_chunk_that_is_needed_in_part_is_checked_whole(limits: Limits, tmp_path: Path) -> None:
    directory = save_chunks(tmp_path / "c", {"matrix": (MATRIX, [((0, 0), (6, 4))])})
    entry = publish(directory).tensors["matrix@0,0"]
    with playing(0, 2), open_distcp(directory) as opened:
        target = distribute_tensor(torch.zeros(6, 4), init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
        assert opened.fill({"matrix": target}, limits=limits) == 96
        assert torch.equal(target._local_tensor, MATRIX[:3])
        flip(directory / "__0_0.distcp", entry.offset + entry.size - 1)  # not in this rank's half
        with pytest.raises(CorruptCheckpoint, match="'matrix'"):
            opened.fill({"matrix": target}, limits=limits)
        bytes_read = opened.fill({"matrix": target}, limits=limits, verify=False)
        assert bytes_read == (96 if limits == Limits() else 48)
        assert torch.equal(target._local_tensor, MATRIX[:3])


def test_a_storage_that_is_smaller_than_its_tensor(tmp_path: Path) -> None:
    directory = save_chunks(tmp_path / "c", {"matrix": (MATRIX, [((0, 0), (6, 4))])}, files=1)
    path = directory / "__0_0.distcp"
    with zipfile.ZipFile(path) as whole:
        records = {info.filename: whole.read(info) for info in whole.infolist()}
    with zipfile.ZipFile(path, "w") as short:
        for name, content in records.items():
            short.writestr(name, content[:-4] if name.endswith("data/0") else content)

    def shorten(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex("matrix", (0, 0))].length = path.stat().st_size

    change_metadata(directory, shorten)
    with pytest.raises(CorruptCheckpoint, match=r"'matrix'.* a storage of 92 bytes .* the 96 bytes of its tensor"):
        load(directory, {"matrix": torch.zeros(6, 4)})


def test_a_blob_that_is_not_what_metadata_says(tmp_path: Path) -> None:
    directory = two_ranks(tmp_path / "c")

    def swap(metadata: Metadata) -> None:
        data = metadata.storage_data
        data[MetadataIndex("step", ())], data[MetadataIndex("matrix", (0, 0))] = (
            data[MetadataIndex("matrix", (0, 0))],
            data[MetadataIndex("step", ())],
        )

    change_metadata(directory, swap)
    refused(directory, "__0_0.distcp", "'step'", "(3, 4)")


@pytest.mark.parametrize("limits", [Limits(), Limits(small_bytes=0)], ids=["small", "large"])
def test_a_blob_that_is_none(limits: Limits, tmp_path: Path) -> None:
    directory = two_ranks(tmp_path / "c")
    info = read_metadata(directory).storage_data[MetadataIndex("matrix", (3, 0))]
    content = bytearray((directory / "__1_0.distcp").read_bytes())
    content[info.offset : info.offset + info.length] = bytes(info.length)
    (directory / "__1_0.distcp").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"__1_0.distcp: 'matrix' \(its chunk at \(3, 0\)\), bytes 0 to"):
        load(directory, limits=limits)


def test_blobs_that_hold_no_plain_values_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "c", {"conjugate": torch.ones(3, dtype=torch.complex64).conj()})
    with pytest.raises(CorruptCheckpoint, match=r"'conjugate'.*conjugate view"):
        load(tmp_path / "c", {"conjugate": torch.zeros(3, dtype=torch.complex64)})


def test_objects_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_chunks(tmp_path / "c", {"step": (STEP, [((), ())])}, objects={"bad": Executed(), "good": {"lr": 1.0}})
    with open_distcp(tmp_path / "c") as opened:
        assert opened.object("good") == {"lr": 1.0}
        with pytest.raises(CorruptCheckpoint, match=r"__0_1.distcp: 'bad' is refused.*mkdir"):
            opened.object("bad")
    assert not (tmp_path / "executed").exists()


def test_damaged_objects(tmp_path: Path) -> None:
    directory = two_ranks(tmp_path / "c")
    (directory / "__0_1.distcp").write_bytes(bytes((directory / "__0_1.distcp").stat().st_size))
    with open_distcp(directory) as opened, pytest.raises(CorruptCheckpoint, match=r"__0_1.distcp: 'lr'"):
        opened.object("lr")
    directory = published(tmp_path / "d")
    flip(directory / "__0_1.distcp", 100)
    with open_distcp(directory) as opened, pytest.raises(CorruptCheckpoint, match=r"__0_1.distcp: was changed"):
        opened.object("lr")


def test_all_differences_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = {key: (torch.ones(2, 2), [((0, 0), (2, 2))]) for key in ("a", "shape", "dtype", "meta", "surplus")}
    targets = {
        "a": torch.zeros(2, 2),
        "absent": torch.zeros(1),
        "shape": torch.zeros(2, 3),
        "dtype": torch.zeros(2, 2, dtype=torch.bfloat16),
        "meta": torch.zeros(2, 2, device="meta"),
    }
    with open_distcp(save_chunks(tmp_path / "c", tensors)) as opened:
        text = opened.differences(targets)
        assert "1 tensors are not in the checkpoint: absent" in text
        assert "1 tensors of the checkpoint have no place: surplus" in text
        assert "shape has shape (2, 2) in the checkpoint, (2, 3) here" in text
        assert "dtype is torch.float32 in the checkpoint, torch.bfloat16 here" in text
        assert "meta is on the meta device" in text
        with pytest.raises(ModelMismatch) as raised:
            opened.fill(targets)
        assert text in str(raised.value)
        assert not targets["a"].any()
        assert "surplus" not in opened.differences(targets, partial=True)
        with pytest.raises(ModelMismatch, match="surplus"):
            opened.fill({"a": targets["a"]})
        opened.fill({"a": targets["a"]}, partial=True)
        assert targets["a"].all()
        assert len(opened.differences({f"key {i}": STEP for i in range(10_000)})) < 1000


def test_what_one_rank_alone_had_is_checked(tmp_path: Path) -> None:
    directory = published(tmp_path / "c")
    flip(directory / rank_state_name(0), 200)
    with open_distcp(directory) as opened:
        with pytest.raises(CorruptCheckpoint, match=r"rank-00000.pt: was changed or damaged"):
            opened.rank_state(0)
        assert opened.rank_state(1)["rank"] == 1
        with pytest.raises(LoadError, match=r"rank-00002.pt: is not there"):
            opened.rank_state(2)
        (directory / "late.json").write_text("{}")
        with pytest.raises(CorruptCheckpoint, match=r"late.json: was not published"):
            opened.read_checked("late.json")
        os.truncate(directory / "train_state.json", 3)
        with pytest.raises(CorruptCheckpoint, match=r"train_state.json: is truncated"):
            opened.read_checked("train_state.json")


def test_state_of_a_rank_that_is_no_dictionary(tmp_path: Path) -> None:
    directory = two_ranks(tmp_path / "c")
    torch.save([1], directory / rank_state_name(0))
    torch.save(Executed(), directory / rank_state_name(1))
    with open_distcp(directory) as opened:
        with pytest.raises(CorruptCheckpoint, match="a list instead of a dictionary"):
            opened.rank_state(0)
        with pytest.raises(CorruptCheckpoint, match="would run code"):
            opened.rank_state(1)


def test_tied_tensors_are_stored_and_published_once(tmp_path: Path) -> None:
    def tie(metadata: Metadata) -> None:
        metadata.state_dict_metadata["tied"] = metadata.state_dict_metadata["matrix"]
        for offsets, _ in ROWS:
            metadata.storage_data[MetadataIndex("tied", offsets)] = metadata.storage_data[
                MetadataIndex("matrix", offsets)
            ]

    directory = published(tmp_path / "c")
    manifest = manifest_of(directory)
    change_metadata(directory, tie)
    files = {**manifest.files, ".metadata": manifest_of(directory).files[".metadata"]}
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(replace(manifest, files=files)))
    targets = load(directory, {**empty_targets(), "tied": torch.zeros(6, 4)})
    assert torch.equal(targets["matrix"], MATRIX)
    assert torch.equal(targets["tied"], MATRIX)
    flip(directory / "__1_0.distcp", manifest.tensors["matrix@3,0"].offset)
    with pytest.raises(CorruptCheckpoint, match=r"__1_0.distcp: 'tied'"), open_distcp(directory) as opened:
        opened.fill({"tied": torch.zeros(6, 4)}, partial=True)


def test_empty_chunks_need_no_place(tmp_path: Path) -> None:
    """Ranks that hold nothing of a tensor say so, all with the same offsets."""

    def add(metadata: Metadata) -> None:
        empty = ChunkStorageMetadata(torch.Size((6, 0)), torch.Size((0, 4)))
        metadata.state_dict_metadata["matrix"].chunks += [empty, empty]

    directory = two_ranks(tmp_path / "c")
    change_metadata(directory, add)
    publish(directory)
    assert torch.equal(load(directory)["matrix"], MATRIX)


def test_an_empty_tensor_may_be_in_the_manifest_or_not(tmp_path: Path) -> None:
    directory = save_chunks(tmp_path / "c", {"none": (torch.zeros(0, 3), [((0, 0), (0, 3))])})
    load(directory, {"none": torch.zeros(0, 3)})
    manifest = replace(manifest_of(directory), tensors={})
    entry = TensorEntry(file="__0_0.distcp", offset=0, size=0, crc64nvme="0" * 16)
    for tensors in ({}, {"none@0,0": entry}):
        (directory / MANIFEST_NAME).write_bytes(encode_manifest(replace(manifest, tensors=tensors)))
        load(directory, {"none": torch.zeros(0, 3)})
