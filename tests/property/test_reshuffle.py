"""Whatever is cut how: the rows that ranks exchange tile the tensor, and the bytes that they stage tile the file."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.placement import Holdings
from stillframe.layout.reshuffle import plan_reshuffles, share_with_reshuffles
from stillframe.layout.runs import Runs
from stillframe.layout.shares import PlacedItem, rank_share
from stillframe.records import FileLayout, Item, Layout, RankShare, Reshuffle
from tests.playing import playing

MESHES = [(2,), (3,), (4,), (2, 2), (3, 2), (2, 3), (2, 2, 2)]


@st.composite
def distributions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]:
    """One mesh dimension shards a dimension behind the first; the others the first, or none."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    mesh_shape = draw(st.sampled_from(MESHES))
    across = draw(st.integers(0, len(mesh_shape) - 1))
    placements: list[Placement] = []
    for mesh_dim in range(len(mesh_shape)):
        if mesh_dim == across:
            dim = draw(st.integers(1, len(shape) - 1))
            factor = draw(st.integers(1, 3))
            placements.append(_StridedShard(dim, split_factor=factor) if factor > 1 else Shard(dim))
        else:
            placements.append(draw(st.sampled_from([Shard(0), Replicate()])))
    return shape, mesh_shape, tuple(placements)


def _planned(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], bucket_bytes: int
) -> list[tuple[RankShare, torch.Tensor, str]]:
    """Of every rank its share of one file, its local part of a tensor that counts from 0, and the signature."""
    size = math.prod(shape)
    key = Key(name="w", shape=shape, dtype=torch.int64, runs=Runs.of([(0, 0, 0, size)]), block=0, block_bytes=8 * size)
    item = PlacedItem(file=0, file_offset=0, length_bytes=8 * size, runs=key.runs, element_bytes=8)
    file = FileLayout(name="f", size_bytes=8 * size, items=(Item(name="w", file_offset=0, length_bytes=8 * size),))
    world_size = math.prod(mesh_shape)
    layout = Layout(
        format="hf", world_size=world_size, files=(file,), inline_files=(), total_bytes=8 * size, digest="d"
    )
    planned = []
    for rank in range(world_size):
        with playing(rank, world_size):
            mesh = init_device_mesh("cpu", mesh_shape)
            tensor = distribute_tensor(torch.arange(size).reshape(shape), mesh, placements, src_data_rank=None)
            held = Holdings(rank=rank, world_size=world_size)
            holdings = {"w": held.of("w", tensor, is_parameter=True)}
            plan = plan_reshuffles(
                KeyMap(keys=(key,), sources=("w",)), {"w": tensor}, holdings, held, bucket_bytes=bucket_bytes
            )
            share = rank_share(layout, [item], ["w"], plan.holdings, rank=rank, plan_id=1)
            share = share_with_reshuffles(share, plan.reshuffles, {"w": tensor})
            planned.append((share, tensor._local_tensor, plan.holdings["w"].signature))
    return planned


def _bucket(reshuffle: Reshuffle, locals_: dict[int, torch.Tensor], member: int, bucket: int) -> list[int]:
    """What `member` gets, worked out by itself: each row element by element, from those who have it."""
    columns = sum(count for intervals in reshuffle.columns for _, count in intervals)
    rows = np.full((reshuffle.row_count, columns, reshuffle.column_elements), -1, dtype=np.int64)
    for number, global_rank in enumerate(reshuffle.members):
        index = [first + i for first, count in reshuffle.columns[number] for i in range(count)]
        rows[:, index] = locals_[global_rank].reshape(rows[:, index].shape).numpy()
    found: list[int] = rows[list(reshuffle.in_bucket(member, bucket))].reshape(-1).tolist()
    return found


@settings(max_examples=100)
@given(distributions(), st.integers(1, 600))
def test_every_element_is_staged_once_and_right(
    drawn: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]], bucket_bytes: int
) -> None:
    planned = _planned(*drawn, bucket_bytes)
    size = math.prod(drawn[0])
    written, times = np.full(size, -1), np.zeros(size, dtype=np.int64)
    locals_ = {rank: local for rank, (_, local, _) in enumerate(planned)}
    assert len({signature for _, _, signature in planned}) == 1
    assert len({len(share.reshuffles) for share, _, _ in planned}) == 1
    for rank, (share, local, _) in enumerate(planned):
        arena = np.full(-(-share.plan.arena_bytes // 8), -1)
        for copy in share.copies:
            place = copy.arena_offset // 8
            part = local.reshape(-1)[copy.first_element :][: copy.element_count]
            arena[place : place + copy.element_count] = part.numpy()
        for reshuffle in share.reshuffles:
            assert not share.copies
            assert len(reshuffle.copies) == reshuffle.bucket_count
            me = reshuffle.members.index(rank)
            for number, copies in enumerate(reshuffle.copies):
                rows = _bucket(reshuffle, locals_, me, number)
                assert len(rows) * 8 <= max(bucket_bytes, reshuffle.whole_row_elements * 8)
                for copy in copies:
                    place = copy.arena_offset // 8
                    assert copy.first_element + copy.element_count <= len(rows)
                    arena[place : place + copy.element_count] = rows[copy.first_element :][: copy.element_count]
        for file in share.plan.files:
            for extent in file.extents:
                low, count = extent.file_offset // 8, extent.length_bytes // 8
                written[low : low + count] = arena[extent.arena_offset // 8 :][:count]
                times[low : low + count] += 1
    assert (times == 1).all()
    assert written.tolist() == list(range(size))
