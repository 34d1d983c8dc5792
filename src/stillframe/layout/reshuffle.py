"""Tensors whose shards cut their rows into short runs: each rank becomes the owner of whole rows instead.

A matrix that tensor parallelism shards along its columns is, on each rank, as many runs of the file as it has rows.
The ranks that share the rows exchange them (`snapshot.reshuffle` does it), and then each has a few long runs. Here it
is decided which tensors these are, and who gets which rows: by shapes and placements alone, so by all ranks alike. No
communication.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from stillframe.layout.keys import KeyMap
from stillframe.layout.meshes import replicas_at
from stillframe.layout.placement import Holding, Holdings, Placed, flat_runs
from stillframe.layout.runs import Runs, overlap
from stillframe.records import Copy, RankShare, Reshuffle, Reshuffled

DIRECT_FROM_BYTES = 16 << 10
"""Runs of at least this length are written where they are (docs/design/0008-reshuffle.md has the measurement)."""
BUCKET_BYTES = 32 << 20
"""How much a rank gets in one step of an exchange; it holds three times that meanwhile. At least one row, but rows of
runs shorter than DIRECT_FROM_BYTES are longer than this only where some thousand ranks share them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshufflePlan:
    """What is exchanged, in the order of the model's tensors, and what this rank holds of each tensor afterwards.

    A holding of an exchanged tensor counts in the rows that this rank then owns, whole and flat: that array never
    exists at once. `summary` is None if nothing is exchanged; it is the same on all ranks.
    """

    reshuffles: tuple[Reshuffle, ...]
    holdings: Mapping[str, Holding]
    summary: Reshuffled | None

    @staticmethod
    def of_none(holdings: Mapping[str, Holding]) -> ReshufflePlan:
        """Every rank writes what it holds."""
        return ReshufflePlan(reshuffles=(), holdings=holdings, summary=None)


def plan_reshuffles(
    key_map: KeyMap,
    tensors: Mapping[str, torch.Tensor],
    holdings: Mapping[str, Holding],
    held: Holdings,
    *,
    leave: Collection[str] = (),
    direct_from_bytes: int | None = None,
    bucket_bytes: int | None = None,
) -> ReshufflePlan:
    """Which tensors are exchanged. `key_map` must be the same on all ranks; `held` made `holdings`.

    A tensor is, if one mesh dimension alone shards one of its dimensions behind the first, the others shard none or the
    first, and its longest run is shorter than `direct_from_bytes`. Tensors that a key has with its dimensions in
    another order stay as they are: their matrices are copied whole, from where they are. So do those in `leave`.
    Those that only other stages of a pipeline hold are counted, and exchanged there.
    """
    direct_from_bytes = DIRECT_FROM_BYTES if direct_from_bytes is None else direct_from_bytes
    bucket_bytes = BUCKET_BYTES if bucket_bytes is None else bucket_bytes
    saved: set[int] = set()
    turned: set[int] = set()
    for key in key_map.keys:
        (saved if key.dims is None and key.matrix is None else turned).update(np.unique(key.runs.source).tolist())
    afterwards = dict(holdings)
    reshuffles = []
    count = size_bytes = 0
    made: dict[tuple[int, int], tuple[Reshuffle, Holding] | None] = {}  # equal tensors, equal exchanges
    for index in sorted(saved - turned):
        name = key_map.sources[index]
        tensor = tensors[name]
        if not tensor.numel() or name in leave or (distribution := held.placed(name, tensor)) is None:
            continue
        kind = (id(distribution), tensor.dtype.itemsize)
        if kind not in made:
            made[kind] = _exchange(distribution, tensor.dtype.itemsize, direct_from_bytes, bucket_bytes)
        if (found := made[kind]) is not None:
            reshuffle, holding = found
            before = holdings[name]
            is_held = held.rank in held.holders(name)
            signature = f"{before.signature} reshuffled along {reshuffle.mesh_dim} by {reshuffle.bucket_rows} rows"
            afterwards[name] = replace(holding if is_held else before, signature=signature)
            if is_held:
                reshuffles.append(replace(reshuffle, tensor=name))
            count += 1
            size_bytes += tensor.numel() * tensor.dtype.itemsize
    summary = Reshuffled(tensors=count, size_bytes=size_bytes, bucket_bytes=bucket_bytes)
    return ReshufflePlan(reshuffles=tuple(reshuffles), holdings=afterwards, summary=summary if count else None)


def share_with_reshuffles(
    share: RankShare, reshuffles: Sequence[Reshuffle], tensors: Mapping[str, torch.Tensor]
) -> RankShare:
    """`share`, made of the holdings after the exchange, with the copies of what is exchanged where they belong: at the
    bucket in which the elements come, cut where buckets meet."""
    exchanged = {reshuffle.tensor: reshuffle for reshuffle in reshuffles}
    direct = []
    arriving: dict[str, list[list[Copy]]] = defaultdict(list)
    for name, reshuffle in exchanged.items():
        arriving[name] = [[] for _ in range(reshuffle.bucket_count)]
    for copy in share.copies:
        if copy.tensor not in exchanged:
            direct.append(copy)
            continue
        reshuffle = exchanged[copy.tensor]
        bucket_elements = reshuffle.bucket_rows * reshuffle.whole_row_elements
        becomes: torch.dtype = tensors[copy.tensor].dtype if copy.dtype is None else getattr(torch, copy.dtype)
        for bucket, part in _cut(copy, bucket_elements, becomes.itemsize):
            arriving[copy.tensor][bucket].append(part)
    return replace(
        share,
        copies=tuple(direct),
        reshuffles=tuple(replace(r, copies=tuple(map(tuple, arriving[r.tensor]))) for r in reshuffles),
    )


def _exchange(
    distribution: Placed, element_bytes: int, direct_from_bytes: int, bucket_bytes: int
) -> tuple[Reshuffle, Holding] | None:
    """The exchange of a tensor so distributed (not named yet), and what this rank holds then; None if it stays."""
    behind_first = [
        (mesh_dim, placement.dim)
        for mesh_dim, placement in enumerate(distribution.placements)
        if isinstance(placement, (Shard, _StridedShard)) and placement.dim > 0
    ]
    if len(behind_first) != 1:
        return None
    mesh_dim, dim = behind_first[0]
    shape, ranks, coordinate = distribution.shape, distribution.part.ranks, distribution.coordinate
    count = ranks.shape[mesh_dim]

    def at(member: int) -> tuple[int, ...]:
        return (*coordinate[:mesh_dim], member, *coordinate[mesh_dim + 1 :])

    columns = tuple(distribution.along(at(member))[dim] for member in range(count))
    column_elements = math.prod(shape[dim + 1 :])
    longest = max(length for intervals in columns for _, length in intervals)
    if longest == shape[dim] or longest * column_elements * element_bytes >= direct_from_bytes:
        return None
    per_dim = distribution.along(coordinate)
    # What is sent of a row to all owners together is at most this, and what is received at most as much.
    row_bytes = count * max(sum(n for _, n in c) for c in columns) * column_elements * element_bytes
    reshuffle = Reshuffle(
        tensor="",
        mesh_dim=mesh_dim,
        members=tuple(int(ranks[at(member)]) for member in range(count)),
        row_count=math.prod(sum(length for _, length in intervals) for intervals in per_dim[:dim]),
        column_elements=column_elements,
        columns=columns,
        bucket_rows=max(1, bucket_bytes // row_bytes),
    )
    per_dim[dim] = ((0, shape[dim]),)
    rows = reshuffle.owned(coordinate[mesh_dim])
    holding = Holding(
        runs=_part(
            flat_runs(shape, per_dim),
            rows.start * reshuffle.whole_row_elements,
            len(rows) * reshuffle.whole_row_elements,
        ),
        replicas=replicas_at(distribution.placements, distribution.part, coordinate, distribution.holders),
        signature=distribution.signature,
    )
    return reshuffle, holding


def _part(runs: Runs, first: int, count: int) -> Runs:
    """The part of `runs` that lies in `count` elements of their source from its `first` on, counted from there."""
    index, _, local, length = overlap(runs.source_start, runs.length, np.array([first]), np.array([count]))
    start = runs.start[index] + (local - runs.source_start[index])
    return Runs(start, runs.source[index], local - first, length)


def _cut(copy: Copy, bucket_elements: int, element_bytes: int) -> list[tuple[int, Copy]]:
    """`copy` bucket by bucket, counted in each from its first element."""
    parts = []
    done = 0
    while done < copy.element_count:
        bucket, within = divmod(copy.first_element + done, bucket_elements)
        count = min(copy.element_count - done, bucket_elements - within)
        offset = copy.arena_offset + done * element_bytes
        parts.append((bucket, replace(copy, first_element=within, element_count=count, arena_offset=offset)))
        done += count
    return parts
