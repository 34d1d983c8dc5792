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
from stillframe.layout.intervals import DimShards, Intervals, borders, held_along, order_matters, partitions
from stillframe.layout.meshes import MeshPart, MeshPlace, part_of, place_in_mesh, replicas_at
from stillframe.layout.runs import Ints, Runs, coalesce, strided
from stillframe.layout.stages import Distribution, Member, Stages


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
    """A tensor's distribution over the ranks: all `parts`, which tile the tensor, or those of one rank.

    `signature` describes it, the same on all ranks. An object is shared by all tensors that are spread alike.
    """

    parts: tuple[Part, ...]
    signature: str


class Holdings:
    """What `rank` of `world_size` holds of each tensor of a model; equal distributions are worked out once.

    `stages`: which ranks hold which tensors, where not all hold all. `any_mesh`: do not ask that the meshes of DTensors
    belong to one that spans the job; then the ranks that hold the same cannot be told.
    """

    def __init__(self, *, rank: int, world_size: int, stages: Stages | None = None, any_mesh: bool = False) -> None:
        self.rank = rank
        self._everyone = tuple(range(world_size))
        self._stages = stages
        self._any_mesh = any_mesh or stages is not None
        self._places: dict[int, MeshPlace] = {}
        self._distributions: dict[tuple[object, ...], Placed] = {}
        self._holdings: dict[Placed, Holding] = {}
        self._spreads: dict[object, Spread] = {}

    def of(self, name: str, tensor: torch.Tensor, *, is_parameter: bool) -> Holding:
        """What the rank holds of `tensor`: a DTensor, or a plain tensor that all ranks of the job (or of its stages)
        hold alike.

        A plain buffer counts as held by the first of these ranks alone: ranks may differ in their running statistics,
        and a file must not mix them. Raises UnsupportedPlacement where the distribution cannot be described exactly.
        """
        member = None if self._stages is None else self._stages[name]
        if member is not None and self.rank not in member.holders:
            return Holding(runs=Runs.of([]), replicas=(self.rank,), signature=member.signature)
        if not isinstance(tensor, DTensor):
            replicas = self._everyone if member is None else member.holders
            replicas = replicas if is_parameter else replicas[:1]
            held = tensor.numel() and self.rank in replicas
            whole = Runs.of([(0, 0, 0, tensor.numel())] if held else [])
            signature = f"replicas={len(replicas)}" if member is None else member.signature
            return Holding(runs=whole, replicas=replicas, signature=signature)
        distribution = self._distribution(name, tensor, member)
        if distribution not in self._holdings:
            self._holdings[distribution] = distribution.holding()
        found = self._holdings[distribution]
        return found if member is None else replace(found, signature=member.signature)

    def spread(self, name: str, tensor: torch.Tensor, *, rank_0_only: bool, everybody: bool | None = None) -> Spread:
        """How `tensor` is distributed over the ranks; `rank_0_only` for a plain tensor of which only rank 0's counts,
        or that of the first rank that holds it. `everybody`: all parts, else this rank's own; None: all for rank 0.

        A tensor without elements is one box, held by all. Raises UnsupportedPlacement like `of`.
        """
        member = None if self._stages is None else self._stages[name]
        is_held = member is None or self.rank in member.holders
        everybody = self.rank == 0 if everybody is None else everybody
        if tensor.numel() and (isinstance(tensor, DTensor) if member is None else member.distribution is not None):
            if not is_held and not everybody:
                return Spread(parts=(), signature="" if member is None else member.signature)
            if isinstance(tensor, DTensor) and is_held:
                distribution = self._distribution(name, tensor, member)
            else:
                distribution = self._distribution_of_others(name, member)
            if (distribution, everybody) not in self._spreads:
                self._spreads[distribution, everybody] = distribution.spread(everybody=everybody)
            found = self._spreads[distribution, everybody]
            return found if member is None else replace(found, signature=member.signature)
        holders = self._everyone if member is None else member.holders
        shape = tuple(tensor.shape)
        key = (shape, id(holders), rank_0_only, everybody)
        if key not in self._spreads:
            replicas = holders[:1] if rank_0_only else holders
            origin = (0,) * len(shape)
            whole = Box(offsets=origin, sizes=shape, local_offsets=origin, local_shape=shape)
            is_planned = everybody or self.rank in replicas
            parts = (Part(replicas=replicas, boxes=(whole,)),) if is_planned else ()
            self._spreads[key] = Spread(parts=parts, signature=f"replicas={len(replicas)}")
        found = self._spreads[key]
        return found if member is None else replace(found, signature=member.signature)

    def distribution(self, name: str, tensor: DTensor) -> Distribution:
        """How `tensor` is distributed, as it is told to other ranks; one object for all that are distributed alike."""
        return self._distribution(name, tensor, None).told

    def cut_dims(self, name: str, tensor: torch.Tensor) -> tuple[int, ...]:
        """The dimensions along which any rank holds less than all of `tensor`; the same on all ranks."""
        if (distribution := self.placed(name, tensor)) is None:
            return ()
        return tuple(dim for dim, cuts in enumerate(distribution.shards) if any(parts > 1 for _, parts, _ in cuts))

    def placed(self, name: str, tensor: torch.Tensor) -> Placed | None:
        """How `tensor` is distributed, also one that this rank holds nothing of; None for a plain tensor. One object
        for all that are distributed alike. Raises like `of`."""
        member = None if self._stages is None else self._stages.get(name)  # of what is computed there is none
        if isinstance(tensor, DTensor) and (member is None or self.rank in member.holders):
            return self._distribution(name, tensor, member)
        is_plain = member is None or member.distribution is None
        return None if is_plain else self._distribution_of_others(name, member)

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks that have the tensor of this name, or parts of it, ascending; one object for all that the same
        ranks have."""
        member = None if self._stages is None else self._stages.get(name)
        return self._everyone if member is None else member.holders

    def borders(self, name: str, tensor: torch.Tensor) -> tuple[Ints, ...]:
        """For each dimension the indices, ascending, where what another rank holds begins; the same on all ranks."""
        if (distribution := self.placed(name, tensor)) is None:
            return (np.zeros(0, dtype=np.int64),) * tensor.dim()
        return tuple(borders(n, shards) for n, shards in zip(distribution.shape, distribution.shards, strict=True))

    def _distribution(self, name: str, tensor: DTensor, member: Member | None) -> Placed:
        mesh, placements, shape = tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape)
        holders = None if member is None else member.holders
        key = (id(mesh), placements, shape, id(holders))
        if key not in self._distributions:
            if id(mesh) not in self._places:
                self._places[id(mesh)] = place_in_mesh(name, mesh, None if self._any_mesh else self._everyone)
            place = self._places[id(mesh)]
            self._distributions[key] = _distribution(name, shape, placements, place.part, place.coordinate, holders)
        distribution = self._distributions[key]
        expected, local_shape = distribution.local_shape, tuple(tensor._local_tensor.shape)
        if expected != local_shape and (tensor._local_tensor.numel() or 0 not in expected):
            raise UnsupportedPlacement(
                f"{name}: this rank's shard has shape {local_shape} but {placements} of {shape} over "
                f"{tuple(mesh.shape)} devices makes it {expected}"
            )
        return distribution

    def _distribution_of_others(self, name: str, member: Member | None) -> Placed:
        """How a tensor is distributed of which this rank holds nothing."""
        told = None if member is None else member.distribution
        assert member is not None, "without stages, every rank holds a part"
        assert told is not None, "a plain tensor has no distribution"
        key = (id(told), member.shape, id(member.holders))
        if key not in self._distributions:
            part = part_of(name, told.whole, told.ranks)
            nowhere = (0,) * told.ranks.ndim
            self._distributions[key] = _distribution(name, member.shape, told.placements, part, nowhere, member.holders)
        return self._distributions[key]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """How a tensor is distributed, proven to be exactly describable; `shards` and `local_shape` per dimension.

    `coordinate` is this rank's; `holders` the ranks that have the tensor at all, None where all have."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    part: MeshPart
    coordinate: tuple[int, ...]
    holders: tuple[int, ...] | None
    told: Distribution
    shards: tuple[DimShards, ...]
    local_shape: tuple[int, ...]

    @property
    def signature(self) -> str:
        mesh = f"{self.part.ranks.shape} of {self.part.whole.shape}"
        return f"{self.placements} on {mesh} {self.part.identity}"

    def along(self, coordinate: tuple[int, ...]) -> list[Intervals]:
        """What the rank at `coordinate` holds of each dimension."""
        return [held_along(size, shards, coordinate) for size, shards in zip(self.shape, self.shards, strict=True)]

    def holding(self) -> Holding:
        return Holding(
            runs=flat_runs(self.shape, self.along(self.coordinate)),
            replicas=replicas_at(self.placements, self.part, self.coordinate, self.holders),
            signature=self.signature,
        )

    def spread(self, *, everybody: bool) -> Spread:
        """Of `everybody`, or of this rank alone; parts without elements are left out."""
        coordinates = [self.coordinate]
        if everybody:
            # Ranks that differ only along replicated mesh dimensions hold the same part.
            ranges = [
                range(1 if isinstance(p, Replicate) else n)
                for p, n in zip(self.placements, self.part.ranks.shape, strict=True)
            ]
            coordinates = list(product(*ranges))
        parts = []
        for coordinate in coordinates:
            boxes = _boxes(self.along(coordinate))
            if boxes:
                replicas = replicas_at(self.placements, self.part, coordinate, self.holders)
                parts.append(Part(replicas=replicas, boxes=boxes))
        return Spread(parts=tuple(parts), signature=self.signature)


def _distribution(
    name: str,
    shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    part: MeshPart,
    coordinate: tuple[int, ...],
    holders: tuple[int, ...] | None,
) -> Placed:
    _refuse_unsupported(name, placements)
    mesh_shape = part.ranks.shape
    shards = tuple(_shards_of(dim, placements, mesh_shape) for dim in range(len(shape)))
    for dim, size in enumerate(shape):
        _prove_partition(name, dim, size, shards[dim])
        _refuse_ambiguous(name, dim, size, shards[dim])
    per_dim = [held_along(size, shards[dim], coordinate) for dim, size in enumerate(shape)]
    local_shape = tuple(sum(length for _, length in intervals) for intervals in per_dim)
    return Placed(
        shape=shape,
        placements=placements,
        part=part,
        coordinate=coordinate,
        holders=holders,
        told=Distribution(placements=placements, whole=part.whole, ranks=part.first),
        shards=shards,
        local_shape=local_shape,
    )


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
