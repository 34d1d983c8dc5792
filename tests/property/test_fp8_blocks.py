"""Whoever writes the scales of blocks that are not shared holds these blocks whole, however a tensor is distributed."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from stillframe.errors import UnsupportedPlacement
from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.placement import Holdings
from stillframe.layout.quantizing import held_blocks
from stillframe.layout.runs import Runs
from stillframe.patches import BLOCK, block_count
from stillframe.records import Blocks
from stillframe.testing.playing import playing


@st.composite
def distributions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]:
    sizes = st.one_of(st.integers(1, 300), st.sampled_from([128, 192, 256, 384]))
    shape = (*draw(st.sampled_from([(), (1,), (3,)])), draw(sizes), draw(st.sampled_from([1, 2, 130, 256])))
    mesh_shape = draw(st.sampled_from([(1,), (2,), (3,), (2, 2), (2, 3)]))
    strided_dim = draw(st.integers(0, len(shape) - 1))
    placements: list[Placement] = []
    for _ in mesh_shape:
        kind = draw(st.sampled_from(["replicate", "shard", "shard", "strided"]))
        if kind == "strided" and not any(isinstance(p, _StridedShard) for p in placements):
            placements.append(_StridedShard(strided_dim, split_factor=draw(st.integers(1, 3))))
        else:
            placements.append(Replicate() if kind == "replicate" else Shard(draw(st.integers(0, len(shape) - 1))))
    return shape, mesh_shape, tuple(placements)


def blocks_of(
    rank: int, shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> Blocks:
    """What `rank` holds of the matrices that the tensor consists of."""
    *outer, rows, columns = shape
    keys = tuple(
        Key(
            name=f"{number}.weight",
            dtype=torch.float8_e4m3fn,
            shape=(rows, columns),
            runs=Runs.of([(0, 0, number * rows * columns, rows * columns)]),
            block=number,
            block_bytes=1,
            matrix=f"{number}.weight",
        )
        for number in range(math.prod(outer))
    )
    world_size = math.prod(mesh_shape)
    with playing(rank, world_size):
        mesh = init_device_mesh("cpu", mesh_shape)
        tensor = distribute_tensor(torch.zeros(shape), mesh, placements, src_data_rank=None)
        held = Holdings(rank=rank, world_size=world_size)
        holding = held.of("w", tensor, is_parameter=True)
        return held_blocks(KeyMap(sources=("w",), keys=keys), {"w": tensor}, held, {"w": holding})


@settings(max_examples=60)
@given(distributions())
def test_blocks_that_are_not_shared_are_whole_where_their_scales_are_written(
    drawn: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    shape, mesh_shape, _ = drawn
    *outer, rows, columns = shape
    try:
        ranks = [blocks_of(rank, *drawn) for rank in range(math.prod(mesh_shape))]
    except UnsupportedPlacement:
        return
    assert len({blocks.shared_count for blocks in ranks}) == 1
    written = np.zeros((math.prod(outer), block_count(rows)), dtype=int)
    for blocks in ranks:
        for name, matrix in blocks.matrices.items():
            held = np.zeros((rows, columns), dtype=int)
            for patch in matrix.patches:
                held[patch.row : patch.row + patch.rows, patch.column : patch.column + patch.columns] += 1
            assert held.max() == 1
            shared = {row for first, count, _ in matrix.shared for row in range(first, first + count)}
            for row in range(block_count(rows)):
                begins = held[row * BLOCK, : block_count(columns)]
                written[int(name.partition(".")[0]), row] += begins.any()
                if begins.any() and row not in shared:
                    assert held[row * BLOCK : (row + 1) * BLOCK].all()
    assert written.all(), "somebody holds the beginning of each row of blocks"
