"""Which indices of one dimension a rank holds, when the dimension is sharded over some dimensions of a mesh.

Composed as DTensor composes them, mesh dimension by mesh dimension. torch's own
`compute_local_shape_and_global_offset` gives only the first offset of a shard, which is wrong where a shard is made
of several pieces (`_StridedShard`). Checked in tests/property against torch's own `distribute_tensor`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from stillframe.layout.runs import Ints

_INDICES_AT_ONCE = 1 << 20

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


def _sizes(total: int, parts: int) -> Ints:
    """How many of `total` indices each chunk has, as `_chunk` cuts them."""
    return np.diff(np.minimum(np.arange(parts + 1) * -(-total // parts), total))


@lru_cache(maxsize=4096)
def partitions(size: int, shards: DimShards) -> bool:
    """Whether the ranks' index sets along one dimension tile it: each index exactly once.

    Where a list of indices is cut depends only on how many there are. So it is enough to look, mesh dimension by mesh
    dimension, at the cuts of each count that occurs: there are few, however many ranks there are.
    """
    totals = {size}
    for _, parts, split_factor in shards:
        cut: set[int] = set()
        for total in totals:
            held = np.zeros(parts, dtype=np.int64)
            for block, count in zip(*np.unique(_sizes(total, split_factor), return_counts=True), strict=True):
                sizes = _sizes(int(block), parts)
                if sizes.min() < 0:
                    return False
                held += count * sizes
            if held.sum() != total:
                return False
            cut.update(np.unique(held).tolist())
        totals = cut
    return True


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
    for begin in range(0, size, _INDICES_AT_ONCE):
        index = np.arange(begin, min(begin + _INDICES_AT_ONCE, size), dtype=np.int64)
        if not np.array_equal(_places_of(index, size, shards), _places_of(index, size, reordered)):
            return True
    return False


@lru_cache(maxsize=4096)
def borders(size: int, shards: DimShards) -> Ints:
    """The indices of one dimension, ascending, that another rank holds than the index before."""
    coordinates = _places_of(np.arange(size, dtype=np.int64), size, shards)[:-1]
    return np.flatnonzero((coordinates[:, 1:] != coordinates[:, :-1]).any(axis=0)).astype(np.int64) + 1


def _places_of(index: Ints, size: int, shards: DimShards) -> Ints:
    """`held_along`, seen from the indices: a row for each mesh dimension, ascending, says the coordinate of the rank
    that holds them, the last one the position in what it holds. The ranks need not be gone through, however many."""
    coordinates: dict[int, Ints] = {}
    position, total = index, np.full_like(index, size)
    for mesh_dim, parts, split_factor in shards:
        block_size = -(-total // split_factor)
        block, within = np.divmod(position, block_size)
        part, within = np.divmod(within, -(-np.minimum(block_size, total - block * block_size) // parts))
        full_blocks, rest = np.divmod(total, block_size)
        of_full, of_rest = (
            np.clip(size - part * -(-size // parts), 0, -(-size // parts)) for size in (block_size, rest)
        )
        position, total = block * of_full + within, full_blocks * of_full + of_rest
        coordinates[mesh_dim] = part
    return np.stack([*(coordinates[mesh_dim] for mesh_dim in sorted(coordinates)), position])
