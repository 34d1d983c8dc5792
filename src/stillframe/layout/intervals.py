"""Which indices of one dimension a rank holds, when the dimension is sharded over some dimensions of a mesh.

Composed as DTensor composes them, mesh dimension by mesh dimension. torch's own
`compute_local_shape_and_global_offset` gives only the first offset of a shard, which is wrong where a shard is made
of several pieces (`_StridedShard`). Checked in tests/property against torch's own `distribute_tensor`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

Intervals = tuple[tuple[int, int], ...]  # (start, length) along one dimension, in the order of the local tensor
DimShards = tuple[tuple[int, int, int], ...]  # (mesh dimension, its size, split factor; 1 for a plain Shard)


@lru_cache(maxsize=4096)
def held_along(size: int, shards: DimShards, coordinate: tuple[int, ...]) -> Intervals:
    """The indices of one dimension that the rank at `coordinate` holds, sharded mesh dimension by mesh dimension."""
    held: Intervals = ((0, size),)
    for mesh_dim, parts, split_factor in shards:
        blocks = chunks(held, split_factor)
        held = tuple(piece for block in blocks for piece in _chunk(block, parts, coordinate[mesh_dim]))
    return _joined(held)


def _joined(intervals: Intervals) -> Intervals:
    """The same indices with neighbouring intervals made one."""
    joined: list[tuple[int, int]] = []
    for start, length in intervals:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        elif length:
            joined.append((start, length))
    return tuple(joined)


def chunks(intervals: Intervals, parts: int) -> list[Intervals]:
    """Cut a list of intervals as torch.chunk does, padded with empty chunks to exactly `parts`."""
    return [_chunk(intervals, parts, index) for index in range(parts)]


def _chunk(intervals: Intervals, parts: int, index: int) -> Intervals:
    total = sum(length for _, length in intervals)
    step = -(-total // parts)
    begin, end = min(index * step, total), min((index + 1) * step, total)
    cut, position = [], 0
    for start, length in intervals:
        low, high = max(begin, position), min(end, position + length)
        if low < high:
            cut.append((start + low - position, high - low))
        position += length
    return tuple(cut)


@lru_cache(maxsize=4096)
def partitions(size: int, shards: DimShards) -> bool:
    """Whether the ranks' index sets along one dimension tile it: each index exactly once."""
    held = ((0, size),)
    pieces: list[Intervals] = [held]
    for _, parts, split_factor in shards:
        cut = [[chunks(block, parts) for block in chunks(piece, split_factor)] for piece in pieces]
        pieces = [tuple(x for block in blocks for x in block[part]) for blocks in cut for part in range(parts)]
    position = 0
    for start, length in sorted(interval for piece in pieces for interval in piece):
        if start != position:
            return False
        position += length
    return position == size


@lru_cache(maxsize=4096)
def order_matters(size: int, shards: DimShards) -> bool:
    first = next((i for i, (_, _, split_factor) in enumerate(shards) if split_factor > 1), len(shards))
    later = shards[first + 1 :]
    if size % math.prod(count for _, count, _ in shards) == 0:
        return False
    if not later or shards[first][2] != math.prod(count for _, count, _ in later):
        return False  # a _StridedShard of another origin: only torch's own reading exists
    mesh_dim, parts, _ = shards[first]
    reordered = (*shards[:first], *later, (mesh_dim, parts, 1))
    coordinate = [0] * (1 + max(mesh_dim for mesh_dim, _, _ in shards))
    for place in product(*(range(count) for _, count, _ in shards)):
        for (mesh_dim, _, _), part in zip(shards, place, strict=True):
            coordinate[mesh_dim] = part
        if held_along(size, shards, tuple(coordinate)) != held_along(size, reordered, tuple(coordinate)):
            return True
    return False
