"""Whatever the tensors and their distribution: every element is in one chunk, every byte written once, and right.

torch's fake process group plays one rank at a time (see test_placement).
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from stillframe.errors import UnsupportedPlacement
from stillframe.layout.balance import share_out
from stillframe.layout.distcp import DistcpPlan, plan_distcp
from stillframe.records import InlineFile
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.copy import Snapshotter
from stillframe.testing.playing import playing
from stillframe.tree import StateTree

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a tree; `placements` None for a plain one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...] | None
    rank_0_only: bool = False

    def values(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        raw = torch.randint(0, 2, (math.prod(self.shape) * self.dtype.itemsize,), generator=generator)
        return raw.to(torch.uint8).view(self.dtype).reshape(self.shape)


@st.composite
def trees(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Tensor], int]:
    """A mesh, what is distributed over it, and the limit of a file."""
    mesh_shape = draw(st.sampled_from([(1,), (2,), (3,), (2, 2), (2, 3), (3, 2), (2, 1, 2)]))
    tensors = [draw(tensor(mesh_shape)) for _ in range(draw(st.integers(1, 4)))]
    return mesh_shape, tensors, draw(st.sampled_from([1, 4000, 1 << 30]))


@st.composite
def tensor(draw: st.DrawFn, mesh_shape: tuple[int, ...]) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.integers(0, 3)) == 0:
        return Tensor(shape, dtype, None, rank_0_only=draw(st.booleans()))
    placements: list[Placement] = []
    for _ in mesh_shape:
        dim = draw(st.integers(0, len(shape) - 1)) if shape else 0
        kind = draw(st.sampled_from(["replicate", "shard", "strided"])) if shape else "replicate"
        if kind == "strided" and not any(isinstance(p, _StridedShard) and p.dim == dim for p in placements):
            placements.append(_StridedShard(dim, split_factor=draw(st.integers(1, 3))))
        else:
            placements.append(Replicate() if kind == "replicate" else Shard(dim))
    return Tensor(shape, dtype, tuple(placements))


def plan_rank(
    rank: int, mesh_shape: tuple[int, ...], tensors: Sequence[Tensor], max_file_bytes: int, files: dict[str, bytearray]
) -> tuple[DistcpPlan, tuple[InlineFile, ...]]:
    """The plan of one rank, its share written into `files` (each byte that it writes must not have been written)."""
    world_size = math.prod(mesh_shape)
    with playing(rank, world_size):
        mesh = init_device_mesh("cpu", mesh_shape)
        live = {}
        for i, one in enumerate(tensors):
            values = one.values(i)
            if one.rank_0_only and rank != 0:
                values = torch.zeros_like(values)
            if one.placements is not None:
                values = distribute_tensor(values, mesh, one.placements, src_data_rank=None)
            live[f"model.t{i}"] = values
        keys = [*live, "model.tied", "optimizer.lr"]
        tree = StateTree(
            tensors=live,
            aliases={"model.tied": "model.t0"},
            rank_0_only=frozenset(f"model.t{i}" for i, one in enumerate(tensors) if one.rank_0_only),
            objects={"optimizer.lr": 0.5},
            paths={key: tuple(key.split(".")) for key in keys},
        )
        plan = plan_distcp(tree, rank=rank, world_size=world_size, plan_id=1, max_file_bytes=max_file_bytes)
        arena = Arena(plan.share.plan.arena_bytes)
        snapshotter = Snapshotter(plan.tensors, plan.share.copies, plan.share.envelopes, arena)
        snapshotter.lay_envelopes()
        snapshotter.copy()
        staged = arena.bytes.numpy().tobytes()
        arena.close()
    for file in plan.share.plan.files:
        content = files.setdefault(file.name, bytearray(file.size_bytes))
        end = 0
        for extent in file.extents:
            assert extent.file_offset == end, "the extents of a file that one rank writes alone follow each other"
            end += extent.length_bytes
            content[extent.file_offset : end] = staged[extent.arena_offset :][: extent.length_bytes]
        assert end == file.size_bytes
    inline = () if plan.metadata is None else plan.metadata.render({"optimizer.lr": 0.25})
    return plan, inline


@settings(max_examples=60)
@given(trees())
def test_every_element_is_in_one_chunk_and_every_byte_in_one_extent(
    drawn: tuple[tuple[int, ...], list[Tensor], int],
) -> None:
    mesh_shape, tensors, max_file_bytes = drawn
    world_size = math.prod(mesh_shape)
    files: dict[str, bytearray] = {}
    plans = []
    for rank in range(world_size):
        before = set(files)
        try:
            plan, inline = plan_rank(rank, mesh_shape, tensors, max_file_bytes, files)
        except UnsupportedPlacement:
            plans.append(None)
            continue
        assert not before & {file.name for file in plan.share.plan.files}, "each file has one writer"
        plans.append(plan)
        if rank == 0:
            inline_files = {file.name: file.content for file in inline}
    if None in plans:
        assert plans == [None] * world_size, "all ranks refuse, or none"
        return
    assert len({plan.layout.digest for plan in plans if plan is not None}) == 1
    everything, *others = [plan.layout for plan in plans if plan is not None]
    assert {file.name: file.size_bytes for file in everything.files} == {n: len(c) for n, c in files.items()}
    for layout in others:
        assert set(layout.files) <= set(everything.files)
    _assert_tiled(everything.files)
    metadata = pickle.loads(inline_files[".metadata"])
    files.update({name: bytearray(content) for name, content in inline_files.items()})
    for i, one in enumerate(tensors):
        _assert_read_back(metadata, files, f"model.t{i}", one.values(i))
    _assert_read_back(metadata, files, "model.tied", tensors[0].values(0))
    assert torch.load(_stored(metadata, files, MetadataIndex("optimizer.lr"))) == 0.25


def _assert_tiled(layouts: Sequence[object]) -> None:
    names = []
    for file in layouts:
        end = 0
        for item in file.items:  # type: ignore[attr-defined]
            assert item.file_offset == end
            end += item.length_bytes
            names += [item.name] if item.name else []
        assert end == file.size_bytes  # type: ignore[attr-defined]
    assert len(names) == len(set(names)), "every chunk has a name of its own"


def _stored(metadata: Metadata, files: dict[str, bytearray], index: MetadataIndex) -> io.BytesIO:
    info = metadata.storage_data[index]
    blob = files[info.relative_path][info.offset : info.offset + info.length]
    assert len(blob) == info.length
    return io.BytesIO(blob)


def _assert_read_back(metadata: Metadata, files: dict[str, bytearray], key: str, expected: torch.Tensor) -> None:
    described = metadata.state_dict_metadata[key]
    assert (described.size, described.properties.dtype) == (expected.shape, expected.dtype)
    covered = np.zeros(expected.shape, dtype=np.int64)
    for chunk in described.chunks:
        stored = torch.load(_stored(metadata, files, MetadataIndex(key, chunk.offsets)), weights_only=True)
        box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        assert torch.equal(stored, expected[box])
        covered[box] += 1
    assert (covered == 1).all()
    assert described.chunks, "also a tensor without elements has an entry"


@given(
    boxes=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 4000)), max_size=30),
    replica_count=st.integers(1, 9),
    item_bytes=st.integers(0, 2000),
)
def test_boxes_are_tiled_by_what_replicas_write_of_them(
    boxes: list[tuple[int, int]], replica_count: int, item_bytes: int
) -> None:
    shared = share_out(boxes, replica_count, item_bytes=item_bytes)
    assert len(shared) == len(boxes)
    for (rows, _), cuts in zip(boxes, shared, strict=True):
        assert [cut.first_row for cut in cuts] == [sum(c.row_count for c in cuts[:i]) for i in range(len(cuts))]
        assert sum(cut.row_count for cut in cuts) == rows
        assert all(cut.row_count for cut in cuts) or rows == 0
        assert all(0 <= cut.replica < replica_count for cut in cuts)
    pieces = sum(map(len, shared))
    assert pieces <= len(boxes) + 25 * replica_count, "pieces grow with the replicas, not with their product with boxes"


@pytest.mark.parametrize("replica_count", [2, 8, 64])
def test_replicas_of_a_realistic_model_write_alike(replica_count: int) -> None:
    hidden, inner, vocabulary = 1024, 2816, 151_936
    layer = [(hidden, hidden), (256, hidden), (256, hidden), (hidden, hidden), (hidden, 1), (hidden, 1)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    model = [(vocabulary, hidden), *layer * 24, (hidden, 1)]
    boxes = [(rows, columns * 4) for rows, columns in model * 3] + [(1, 4)] * len(model)
    load = [0] * replica_count
    for (_, row_bytes), cuts in zip(boxes, share_out(boxes, replica_count, item_bytes=1600), strict=True):
        for cut in cuts:
            load[cut.replica] += cut.row_count * row_bytes + 1600
    assert max(load) / (sum(load) / replica_count) <= 1.05
