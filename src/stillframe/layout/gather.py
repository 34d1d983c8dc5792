"""Keys that one rank must make of whole tensors: who is it, what do the others send it, and what does it stage.

These are keys whose values a conversion computes, large transposes that shards cut, and, where each rank has files of
its own, all keys that no rank holds whole. Keys that share a tensor have one owner. Decided by names, shapes and
placements alone, so by all ranks alike. No communication; `snapshot.gather` does it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stillframe.errors import UnsupportedModel
from stillframe.layout.computing import connected
from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.placement import Holding, Holdings
from stillframe.layout.runs import Runs
from stillframe.layout.tracing import is_too_scattered
from stillframe.layout.turned import outer_dims
from stillframe.records import Gather, Gathered, Piece

BUCKET_BYTES = 32 << 20
"""How many bytes travel at once between two ranks; each holds that much besides the tensors. Large enough that a step's
latency is no matter (32 MiB take 3 ms at 10 GB/s), small beside a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherPlan:
    """What this rank takes part in, in the order that all ranks keep, and what follows for its share.

    `tensors` and `holdings` have an entry for each computed key, too: a tensor without data that has its shape and
    dtype. The owner of one of the tensors `owned` holds it whole, and alone counts as holding it. `owner_of`
    has the rank of each key by its number, of those that have one. `summary` and `exchanges` are the same on all ranks:
    which keys are made of what their owner does not have anyway, or computed, and whether any rank sends anything.
    """

    gathers: tuple[Gather, ...]
    tensors: Mapping[str, torch.Tensor]
    holdings: Mapping[str, Holding]
    owned: frozenset[str]
    owner_of: Mapping[int, int]
    summary: Gathered | None
    exchanges: bool


def plan_gathers(
    key_map: KeyMap,
    tensors: Mapping[str, torch.Tensor],
    held: Holdings,
    holdings: Mapping[str, Holding],
    *,
    rank: int,
    world_size: int,
    buffers: frozenset[str],
    every_key: bool = False,
) -> GatherPlan:
    """`key_map` must be the same on all ranks; `held` made `holdings`. Of the plain tensors named in `buffers` only the
    first rank's count. With `every_key` each key has one owner.

    Raises UnsupportedModel where a key that is saved in fp8 shares a tensor with a computed one.
    """
    names = key_map.sources
    sources = [key.made_of or tuple(np.unique(key.runs.source).tolist()) for key in key_map.keys]
    wanted = {
        number
        for number, key in enumerate(key_map.keys)
        if every_key or key.made_of or (key.dims is not None and _is_cut(key, names[sources[number][0]], tensors, held))
    }
    stand_ins = {
        names[int(key.runs.source[0])]: torch.empty(key.shape, dtype=key.dtype, device="meta")
        for key in key_map.keys
        if key.made_of
    }
    planner = _Planner({**tensors, **stand_ins}, held, dict(holdings), names, rank, world_size, buffers)
    owner_of: dict[int, int] = {}
    gathers: list[Gather] = []
    gathered: list[str] = []
    owners = _Owners(world_size)
    groups = [group for group in connected(sources) if not wanted.isdisjoint(group)] if wanted else []
    groups.sort(key=lambda group: -_bytes_of(key_map.keys[number] for number in group))  # equal ones stay in order
    for place, group in enumerate(groups):
        keys = [key_map.keys[number] for number in group]
        used = [names[index] for index in sorted({index for number in group for index in sources[number]})]
        owner = owners.next(_candidates(used, planner.tensors, held), _bytes_of(keys))
        owner_of |= dict.fromkeys(group, owner)
        if planner.gather(place, owner, keys, used, gathers):
            gathered += [key.name for key in keys]
    return GatherPlan(
        gathers=tuple(gathers),
        tensors=planner.tensors,
        holdings=planner.holdings,
        owned=frozenset(planner.owned),
        owner_of=owner_of,
        exchanges=planner.exchanges,
        summary=Gathered(keys=tuple(sorted(gathered)), bucket_bytes=BUCKET_BYTES) if gathered else None,
    )


class _Owners:
    """Hands out keys so that no rank makes much more than the others: each to the one of its candidates that has least
    so far, the lowest of those."""

    def __init__(self, world_size: int) -> None:
        self._loads = [0] * world_size
        self._heaps: dict[int, list[tuple[int, int]]] = {}  # by the candidates, which many keys share

    def next(self, candidates: tuple[int, ...], size_bytes: int) -> int:
        """The owner of keys of that size. `candidates`, ascending, are the same object where they are the same."""
        heap = self._heaps.setdefault(id(candidates), [(0, rank) for rank in candidates])
        while heap[0][0] != self._loads[heap[0][1]]:  # has got something as a candidate among others
            heapq.heapreplace(heap, (self._loads[heap[0][1]], heap[0][1]))
        owner = heap[0][1]
        self._loads[owner] += size_bytes
        heapq.heapreplace(heap, (self._loads[owner], owner))
        return owner


def _candidates(names: Sequence[str], tensors: Mapping[str, torch.Tensor], held: Holdings) -> tuple[int, ...]:
    """The ranks that hold the largest of the tensors `names`, the first of equal ones: in a pipeline, those of a stage.
    Of keys that are made of nothing, all."""
    largest = max(names, key=lambda name: tensors[name].numel() * tensors[name].element_size(), default="")
    return held.holders(largest)


class _Planner:
    """Makes this rank's part of each gather, and notes what the owners hold."""

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        held: Holdings,
        holdings: dict[str, Holding],
        names: Sequence[str],
        rank: int,
        world_size: int,
        buffers: frozenset[str],
    ) -> None:
        self.tensors = tensors
        self.holdings = holdings
        self.owned: set[str] = set()
        self.exchanges = False
        self._held = held
        self._names = names
        self._rank = rank
        self._world_size = world_size
        self._buffers = buffers

    def gather(
        self, place: int, owner: int, keys: Sequence[Key], sources: Sequence[str], gathers: list[Gather]
    ) -> bool:
        """Give `sources`, which the `keys` are made of, to `owner`; whether anything is to do for that in a snapshot,
        and if this rank takes part, what, in `gathers`. `place`: the gather's number, by which replicas take turns."""
        quantized = [key.name for key in keys if key.matrix is not None]
        if quantized:
            raise UnsupportedModel(
                f"{quantized[0]} would be saved in fp8, but shares a tensor with a key whose conversion computes new "
                "values or transposes what shards cut; leave it alone (keep_in_bf16)"
            )
        computed = [self._names[int(key.runs.source[0])] for key in keys if key.made_of]
        moving = [name for name in sources if not self._is_whole_on(name, owner)]
        pieces = [piece for name in moving for piece in self._pieces(name, owner, place)]
        for name in (*sources, *computed):
            self._give(name, owner)
        self.exchanges = self.exchanges or bool(moving)
        if not moving and not computed:
            return False
        if self._rank == owner:
            needed = tuple(sources) if computed else tuple(moving)
            gathers.append(Gather(owner=owner, pieces=tuple(pieces), tensors=needed, computed=tuple(computed)))
        elif pieces:
            gathers.append(Gather(owner=owner, pieces=tuple(pieces)))
        return True

    def _is_whole_on(self, name: str, owner: int) -> bool:
        """The same on all ranks, unlike what each of them knows of its own part."""
        tensor, holders = self.tensors[name], self._held.holders(name)
        if self._held.placed(name, tensor) is None:
            return owner == holders[0] or (owner in holders and name not in self._buffers)
        return owner in holders and not self._held.cut_dims(name, tensor)

    def _pieces(self, name: str, owner: int, place: int) -> list[Piece]:
        """What the owner gets of a tensor, and has itself, or what this rank sends it."""
        if not self.tensors[name].numel():
            return []  # nothing to send, whatever shapes of nothing ranks have
        spread = self._held.spread(
            name, self.tensors[name], rank_0_only=name in self._buffers, everybody=self._rank == owner
        )
        pieces = []
        for part in spread.parts:
            sender = owner if owner in part.replicas else part.replicas[place % len(part.replicas)]
            if self._rank in (owner, sender) and (sender != owner or self._rank == owner):
                pieces += [
                    Piece(
                        tensor=name,
                        sender=sender,
                        offsets=box.offsets,
                        sizes=box.sizes,
                        local_offsets=box.local_offsets,
                    )
                    for box in part.boxes
                ]
        # Each owner begins with another rank, and goes on in order: so ranks that all send to one, then to the next,
        # have something to do meanwhile. No rank waits for one that waits for it: all keep to this order.
        return sorted(pieces, key=lambda piece: (piece.sender - owner) % self._world_size)

    def _give(self, name: str, owner: int) -> None:
        self.owned.add(name)
        size = self.tensors[name].numel() if self._rank == owner else 0
        before = self.holdings[name].signature if name in self.holdings else "computed"
        self.holdings[name] = Holding(
            runs=Runs.of([(0, 0, 0, size)] if size else []), replicas=(owner,), signature=f"{before} on rank {owner}"
        )


def _is_cut(key: Key, name: str, tensors: Mapping[str, torch.Tensor], held: Holdings) -> bool:
    """Whether `key`, the tensor `name` with its dimensions in another order, is too large for the runs that ranks with
    parts of its matrices would copy."""
    assert key.dims is not None, "only such a key is asked about"
    outer = outer_dims(key.dims)
    return is_too_scattered(key.shape) and any(dim >= outer for dim in held.cut_dims(name, tensors[name]))


def _bytes_of(keys: Iterable[Key]) -> int:
    return sum(key.size_bytes for key in keys)
