"""How a tensor is distributed -> which of its elements a rank holds, and which other ranks hold the same.

From the placements alone (`intervals`), without communication: as runs of elements for this rank (`Holding`), or as
boxes, for any rank (`Spread`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from stillframe.errors import UnsupportedPlacement
from stillframe.layout.intervals import DimShards, Intervals, held_along, order_matters, partitions
from stillframe.layout.meshes import MeshPlace, place_in_mesh, replicas_at
from stillframe.layout.runs import Runs, coalesce, strided


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A product of intervals of a tensor, one per dimension: where it begins in the global and in the local tensor.

    `local_shape` is that of the local tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local_offsets: tuple[int, ...]
    local_shape: tuple[int, ...]

    def local_runs(self, source: int) -> Runs:
        """The box's elements, in row-major order, as runs of the flat local tensor, array `source`."""
        strides = _row_major(self.local_shape)
        first = sum(offset * stride for offset, stride in zip(self.local_offsets, strides, strict=True))
        return strided(first, self.sizes, strides, source)

    def rows(self, dim: int, first: int, count: int) -> Box:
        """The part of the box that has `count` indices of dimension `dim`, from its `first` on."""

        def moved(values: tuple[int, ...]) -> tuple[int, ...]:
            return (*values[:dim], values[dim] + first, *values[dim + 1 :])

        sizes = (*self.sizes[:dim], count, *self.sizes[dim + 1 :])
        return replace(self, offsets=moved(self.offsets), sizes=sizes, local_offsets=moved(self.local_offsets))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The elements of a tensor that each of `replicas` (global ranks, ascending) holds, as disjoint boxes."""

    replicas: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A tensor's distribution over the ranks: for rank 0 all `parts`, which tile the tensor; for another its own.

    `signature` describes it, the same on all ranks. An object is shared by all tensors that are spread alike.
    """

    parts: tuple[Part, ...]
    signature: str


class Holdings:
    """What `rank` of `world_size` holds of each tensor of a model; equal distributions are worked out once."""

    def __init__(self, *, rank: int, world_size: int) -> None:
        self._rank = rank
        self._everyone = tuple(range(world_size))
        self._places: dict[int, MeshPlace] = {}
        self._distributions: dict[tuple[object, ...], Distribution] = {}
        self._holdings: dict[Distribution, Holding] = {}
        self._spreads: dict[object, Spread] = {}

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
        distribution = self.distribution(name, tensor)
        if distribution not in self._holdings:
            self._holdings[distribution] = distribution.holding()
        return self._holdings[distribution]

    def spread(self, name: str, tensor: torch.Tensor, *, rank_0_only: bool) -> Spread:
        """How `tensor` is distributed over the ranks; `rank_0_only` for a plain tensor of which only rank 0's counts.

        A tensor without elements is one box, held by all. Raises UnsupportedPlacement like `of`.
        """
        if isinstance(tensor, DTensor) and tensor.numel():
            distribution = self.distribution(name, tensor)
            if distribution not in self._spreads:
                self._spreads[distribution] = distribution.spread(everybody=self._rank == 0)
            return self._spreads[distribution]
        replicas = (0,) if rank_0_only else self._everyone
        shape = tuple(tensor.shape)
        key = (shape, replicas[-1])
        if key not in self._spreads:
            origin = (0,) * len(shape)
            whole = Box(offsets=origin, sizes=shape, local_offsets=origin, local_shape=shape)
            parts = (Part(replicas=replicas, boxes=(whole,)),) if self._rank in replicas else ()
            self._spreads[key] = Spread(parts=parts, signature=f"replicas={len(replicas)}")
        return self._spreads[key]

    def distribution(self, name: str, tensor: DTensor) -> Distribution:
        """How `tensor` is distributed; one object for all that are distributed alike. Raises like `of`."""
        mesh, placements, shape = tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape)
        key = (id(mesh), placements, shape)
        if key not in self._distributions:
            if id(mesh) not in self._places:
                self._places[id(mesh)] = place_in_mesh(name, mesh, self._everyone)
            self._distributions[key] = _distribution(name, shape, placements, self._places[id(mesh)])
        distribution = self._distributions[key]
        expected, local_shape = distribution.local_shape, tuple(tensor._local_tensor.shape)
        if expected != local_shape and (tensor._local_tensor.numel() or 0 not in expected):
            raise UnsupportedPlacement(
                f"{name}: this rank's shard has shape {local_shape} but {placements} of {shape} over "
                f"{tuple(mesh.shape)} devices makes it {expected}"
            )
        return distribution


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distribution:
    """How a tensor is distributed, proven to be exactly describable; `shards` and `local_shape` per dimension."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    place: MeshPlace
    shards: tuple[DimShards, ...]
    local_shape: tuple[int, ...]

    @property
    def signature(self) -> str:
        mesh = f"{self.place.ranks.shape} of {self.place.whole.shape}"
        return f"{self.placements} on {mesh} {self.place.identity}"

    def along(self, coordinate: tuple[int, ...]) -> list[Intervals]:
        """What the rank at `coordinate` holds of each dimension."""
        return [held_along(size, shards, coordinate) for size, shards in zip(self.shape, self.shards, strict=True)]

    def holding(self) -> Holding:
        return Holding(
            runs=flat_runs(self.shape, self.along(self.place.coordinate)),
            replicas=replicas_at(self.placements, self.place, self.place.coordinate),
            signature=self.signature,
        )

    def spread(self, *, everybody: bool) -> Spread:
        """Of `everybody`, or of this rank alone; parts without elements are left out."""
        coordinates = [self.place.coordinate]
        if everybody:
            # Ranks that differ only along replicated mesh dimensions hold the same part.
            ranges = [
                range(1 if isinstance(p, Replicate) else n)
                for p, n in zip(self.placements, self.place.ranks.shape, strict=True)
            ]
            coordinates = list(product(*ranges))
        parts = []
        for coordinate in coordinates:
            boxes = _boxes(self.along(coordinate))
            if boxes:
                parts.append(Part(replicas=replicas_at(self.placements, self.place, coordinate), boxes=boxes))
        return Spread(parts=tuple(parts), signature=self.signature)


def _distribution(
    name: str, shape: tuple[int, ...], placements: tuple[Placement, ...], place: MeshPlace
) -> Distribution:
    _refuse_unsupported(name, placements)
    mesh_shape = place.ranks.shape
    shards = tuple(_shards_of(dim, placements, mesh_shape) for dim in range(len(shape)))
    for dim, size in enumerate(shape):
        _prove_partition(name, dim, size, shards[dim])
        _refuse_ambiguous(name, dim, size, shards[dim])
    per_dim = [held_along(size, shards[dim], place.coordinate) for dim, size in enumerate(shape)]
    local_shape = tuple(sum(length for _, length in intervals) for intervals in per_dim)
    return Distribution(shape=shape, placements=placements, place=place, shards=shards, local_shape=local_shape)


def _boxes(per_dim: list[Intervals]) -> tuple[Box, ...]:
    """The products of the intervals of all dimensions, in the order of the local tensor."""
    local_shape = tuple(sum(length for _, length in intervals) for intervals in per_dim)
    placed = [
        [
            (start, length, local)
            for (start, length), local in zip(intervals, accumulate((n for _, n in intervals), initial=0), strict=False)
        ]
        for intervals in per_dim
    ]
    boxes = []
    for box in product(*placed):
        offsets, sizes, local_offsets = (tuple(values[c] for values in box) for c in range(3))
        boxes.append(Box(offsets=offsets, sizes=sizes, local_offsets=local_offsets, local_shape=local_shape))
    return tuple(boxes)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


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


def _shards_of(dim: int, placements: Sequence[Placement], mesh_shape: tuple[int, ...]) -> DimShards:
    return tuple(
        (mesh_dim, mesh_shape[mesh_dim], int(p.split_factor) if isinstance(p, _StridedShard) else 1)
        for mesh_dim, p in enumerate(placements)
        if isinstance(p, (Shard, _StridedShard)) and p.dim == dim
    )


def _prove_partition(name: str, dim: int, size: int, shards: DimShards) -> None:
    if not partitions(size, shards):
        raise UnsupportedPlacement(f"{name}: the shards along dimension {dim} (size {size}) do not tile it: {shards}")


def _refuse_ambiguous(name: str, dim: int, size: int, shards: DimShards) -> None:
    """Refuse, on every rank, uneven shards whose content depends on who made them.

    `fully_shard` over a tensor-parallel dimension cuts for tensor parallelism first, and describes that as
    `_StridedShard` followed by `Shard`. Where the cuts are uneven, torch's own reading of that description (and so
    its `full_tensor()`) gives other indices than the shards really hold.
    """
    if order_matters(size, shards):
        parts = [count for _, count, _ in shards]
        raise UnsupportedPlacement(
            f"{name}: dimension {dim} of size {size} is sharded unevenly over mesh dimensions of {parts} devices, with "
            f"_StridedShard: what the shards hold is ambiguous. Use sizes that {math.prod(parts)} divides"
        )


def flat_runs(shape: tuple[int, ...], per_dim: list[Intervals]) -> Runs:
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
