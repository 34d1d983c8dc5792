"""How a tensor is distributed -> which of its elements this rank holds, and which other ranks hold the same.

Index sets are composed from the placements themselves, mesh dimension by mesh dimension, in DTensor's order. torch's
own `compute_local_shape_and_global_offset` gives only the first offset of a shard, which is wrong where a shard is
made of several pieces (`_StridedShard`). Checked in tests/property against torch's own `distribute_tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from stillframe.errors import UnsupportedPlacement
from stillframe.layout.runs import Runs, coalesce

_INDICES_AT_ONCE = 1 << 20

Intervals = tuple[tuple[int, int], ...]  # (start, length) along one dimension, in the order of the local tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What this rank holds of one tensor.

    `runs`: position in the global tensor -> position in the local one (both flat, row-major), ascending.
    `replicas`: the global ranks that hold exactly the same elements, this one among them, ascending.
    `signature`: describes the distribution; the same on all ranks, for the layout's digest.
    """

    runs: Runs
    replicas: tuple[int, ...]
    signature: str


class Holdings:
    """What `rank` of `world_size` holds of each tensor of a model; equal distributions are worked out once."""

    def __init__(self, *, rank: int, world_size: int) -> None:
        self._rank = rank
        self._everyone = tuple(range(world_size))
        self._places: dict[int, _Place] = {}
        self._known: dict[tuple[object, ...], tuple[Holding, tuple[int, ...]]] = {}

    def of(self, name: str, tensor: torch.Tensor, *, is_parameter: bool) -> Holding:
        """What the rank holds of `tensor`, a DTensor or a plain tensor that all ranks of the job hold alike.

        A plain buffer counts as held by rank 0 alone: ranks may differ in their running statistics, and a file
        must not mix them. Raises UnsupportedPlacement where the distribution cannot be described exactly.
        """
        if not isinstance(tensor, DTensor):
            replicas = self._everyone if is_parameter else (0,)
            held = tensor.numel() and (is_parameter or self._rank == 0)
            whole = Runs.of([(0, 0, 0, tensor.numel())] if held else [])
            return Holding(runs=whole, replicas=replicas, signature=f"replicas={len(replicas)}")
        mesh, placements, shape = tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape)
        key = (id(mesh), placements, shape)
        if key not in self._known:
            if id(mesh) not in self._places:
                self._places[id(mesh)] = _place(name, mesh, self._everyone)
            self._known[key] = _held(name, shape, placements, self._places[id(mesh)])
        holding, expected = self._known[key]
        local_shape = tuple(tensor._local_tensor.shape)
        if expected != local_shape and (tensor._local_tensor.numel() or 0 not in expected):
            raise UnsupportedPlacement(
                f"{name}: this rank's shard has shape {local_shape} but {placements} of {shape} over "
                f"{tuple(mesh.shape)} devices makes it {expected}"
            )
        return holding


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """This rank's place in a mesh, and the mesh's in the one that spans the job; `mesh` is kept so that its id is."""

    mesh: DeviceMesh
    ranks: npt.NDArray[np.int64]
    coordinate: tuple[int, ...]
    whole: npt.NDArray[np.int64]
    whole_coordinate_of: npt.NDArray[np.int64]
    is_dim_of_part: tuple[bool, ...]


def _place(name: str, mesh: DeviceMesh, everyone: tuple[int, ...]) -> _Place:
    whole = np.asarray(mesh._get_root_mesh().mesh.numpy(), dtype=np.int64)
    flat = whole.reshape(-1)
    if not np.array_equal(np.sort(flat), np.arange(len(everyone))):
        raise UnsupportedPlacement(
            f"{name}: its mesh {mesh} belongs to one of ranks {sorted(flat.tolist())} but the job has ranks "
            f"0..{len(everyone) - 1}; a tensor must be distributed over a mesh that spans all ranks of the job, or "
            "over a part of such a mesh"
        )
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank of a mesh that spans all ranks has a coordinate"
    ranks = np.asarray(mesh.mesh.numpy(), dtype=np.int64)
    coordinate_of = np.stack(np.unravel_index(np.argsort(flat), whole.shape), axis=-1)
    extents = [len(np.unique(column)) for column in coordinate_of[ranks.reshape(-1)].T]
    if math.prod(extents) != ranks.size:
        raise UnsupportedPlacement(f"{name}: its mesh {ranks.tolist()} is no regular part of {whole.tolist()}")
    return _Place(
        mesh=mesh,
        ranks=ranks,
        coordinate=tuple(coordinate),
        whole=whole,
        whole_coordinate_of=coordinate_of,
        is_dim_of_part=tuple(extent > 1 for extent in extents),
    )


def _held(
    name: str, shape: tuple[int, ...], placements: tuple[Placement, ...], place: _Place
) -> tuple[Holding, tuple[int, ...]]:
    """The holding of a tensor so distributed, and the shape that the local tensor must have."""
    _refuse_unsupported(name, placements)
    mesh_shape = place.ranks.shape
    shards = [_shards_of(dim, placements, mesh_shape) for dim in range(len(shape))]
    for dim, size in enumerate(shape):
        _prove_partition(name, dim, size, shards[dim])
        _refuse_ambiguous(name, dim, size, shards[dim])
    per_dim = [_held_along(size, shards[dim], place.coordinate) for dim, size in enumerate(shape)]
    expected = tuple(sum(length for _, length in intervals) for intervals in per_dim)
    signature = f"{placements} on {mesh_shape} of {place.whole.shape}"
    return Holding(
        runs=_flat_runs(shape, per_dim), replicas=_replicas(placements, place), signature=signature
    ), expected


def _replicas(placements: tuple[Placement, ...], place: _Place) -> tuple[int, ...]:
    """All ranks of the job that hold what this one holds.

    A tensor on the part `mesh["fsdp"]` of an (fsdp, tp) mesh, such as a norm, is held alike by all ranks along tp: each
    has it on a part of its own. So the mesh dimensions that the part does not have count as replication.
    """
    index = tuple(
        slice(None) if isinstance(p, Replicate) else c for p, c in zip(placements, place.coordinate, strict=True)
    )
    along = np.zeros(place.whole.size, dtype=np.int64)  # of each rank: where it is along the dimensions of the part
    for dim, is_dim in enumerate(place.is_dim_of_part):
        if is_dim:
            along = along * place.whole.shape[dim] + place.whole_coordinate_of[:, dim]
    return tuple(np.flatnonzero(np.isin(along, along[place.ranks[index].reshape(-1)])).tolist())


def _refuse_unsupported(name: str, placements: Sequence[Placement]) -> None:
    for placement in placements:
        if not isinstance(placement, (Shard, _StridedShard, Replicate)):
            raise UnsupportedPlacement(
                f"{name}: placement {placement} holds no final values; redistribute the tensor to Shard or Replicate"
            )
    strided_dims = [p.dim for p in placements if isinstance(p, _StridedShard)]
    for dim in set(strided_dims):
        if strided_dims.count(dim) > 1:
            # torch's own full_tensor() returns wrong values there, so there is nothing to be equal to.
            raise UnsupportedPlacement(
                f"{name}: two _StridedShard on dimension {dim} ({tuple(placements)}); torch itself cannot "
                "reassemble such a tensor. Shard that dimension over one mesh dimension fewer"
            )


_DimShards = tuple[tuple[int, int, int], ...]  # (mesh dimension, its size, split factor; 1 for a plain Shard)


def _shards_of(dim: int, placements: Sequence[Placement], mesh_shape: tuple[int, ...]) -> _DimShards:
    return tuple(
        (mesh_dim, mesh_shape[mesh_dim], int(p.split_factor) if isinstance(p, _StridedShard) else 1)
        for mesh_dim, p in enumerate(placements)
        if isinstance(p, (Shard, _StridedShard)) and p.dim == dim
    )


@lru_cache(maxsize=4096)
def _held_along(size: int, shards: _DimShards, coordinate: tuple[int, ...]) -> Intervals:
    """The indices of one dimension that the rank at `coordinate` holds, sharded mesh dimension by mesh dimension."""
    held: Intervals = ((0, size),)
    for mesh_dim, parts, split_factor in shards:
        blocks = _chunks(held, split_factor)
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


def _chunks(intervals: Intervals, parts: int) -> list[Intervals]:
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


def _sizes(total: int, parts: int) -> npt.NDArray[np.int64]:
    """How many of `total` indices each chunk has, as `_chunk` cuts them."""
    return np.diff(np.minimum(np.arange(parts + 1) * -(-total // parts), total))


@lru_cache(maxsize=4096)
def _partitions(size: int, shards: _DimShards) -> bool:
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


def _prove_partition(name: str, dim: int, size: int, shards: _DimShards) -> None:
    if not _partitions(size, shards):
        raise UnsupportedPlacement(f"{name}: the shards along dimension {dim} (size {size}) do not tile it: {shards}")


def _refuse_ambiguous(name: str, dim: int, size: int, shards: _DimShards) -> None:
    """Refuse, on every rank, uneven shards whose content depends on who made them.

    `fully_shard` over a tensor-parallel dimension cuts for tensor parallelism first, and describes that as
    `_StridedShard` followed by `Shard`. Where the cuts are uneven, torch's own reading of that description (and so
    its `full_tensor()`) gives other indices than the shards really hold.
    """
    if _order_matters(size, shards):
        parts = [count for _, count, _ in shards]
        raise UnsupportedPlacement(
            f"{name}: dimension {dim} of size {size} is sharded unevenly over mesh dimensions of {parts} devices, with "
            f"_StridedShard: what the shards hold is ambiguous. Use sizes that {math.prod(parts)} divides"
        )


@lru_cache(maxsize=4096)
def _order_matters(size: int, shards: _DimShards) -> bool:
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


def _places_of(index: npt.NDArray[np.int64], size: int, shards: _DimShards) -> npt.NDArray[np.int64]:
    """`_held_along`, seen from the indices: a row for each mesh dimension, ascending, says the coordinate of the rank
    that holds them, the last one the position in what it holds. The ranks need not be gone through, however many."""
    coordinates: dict[int, npt.NDArray[np.int64]] = {}
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


def _flat_runs(shape: tuple[int, ...], per_dim: list[Intervals]) -> Runs:
    """The product of the intervals of all dimensions, as flat runs global -> local, ascending in the global tensor."""
    if any(not intervals for intervals in per_dim):
        return Runs.of([])
    # Dimensions behind the last one that is cut are whole, so a run spans them.
    whole_from = len(shape)
    while whole_from > 0 and per_dim[whole_from - 1] == ((0, shape[whole_from - 1]),):
        whole_from -= 1
    row = math.prod(shape[whole_from:])
    global_start = np.zeros(1, dtype=np.int64)
    local_start = np.zeros(1, dtype=np.int64)
    length = np.array([row], dtype=np.int64)
    global_row = local_row = row
    for dim in range(whole_from - 1, -1, -1):
        intervals = np.array(per_dim[dim], dtype=np.int64)
        if dim == whole_from - 1:  # a run spans a whole interval of the innermost cut dimension ...
            global_start = intervals[:, 0] * row
            length = intervals[:, 1] * row
            local_start = np.cumsum(length) - length
        else:  # ... and is repeated for each index of the dimensions outside of it
            index = np.concatenate([np.arange(start, start + count) for start, count in per_dim[dim]])
            global_start = (index[:, None] * global_row + global_start[None, :]).reshape(-1)
            local_start = (np.arange(len(index))[:, None] * local_row + local_start[None, :]).reshape(-1)
            length = np.tile(length, len(index))
        global_row *= shape[dim]
        local_row *= int(intervals[:, 1].sum())
    order = np.argsort(global_start, kind="stable")
    zeros = np.zeros(len(order), dtype=np.int64)
    return coalesce(Runs(global_start[order], zeros, local_start[order], length[order]))
