"""The tensors of a model whose ranks hold different ones: what each rank says of its own, and what follows from all.

With pipeline parallelism each rank has the part of the model that its stage runs. From the ranks' descriptions, which
they exchange, every rank derives the same `Stages`: all names in the order of the whole model, and of each its shape,
how it is distributed, and which ranks hold it. Descriptions are JSON; ranks of one stage give the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from stillframe.errors import CoverageError, LayoutError
from stillframe.layout.meshes import coordinates_of, part_of
from stillframe.ties import tied_elsewhere


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distribution:
    """A DTensor's placements over a mesh. `ranks`: those of the first of the meshes that are this one for other ranks;
    `whole`: those of the mesh that it is a part of. Shared by all tensors that are distributed alike."""

    placements: tuple[Placement, ...]
    whole: npt.NDArray[np.int64]
    ranks: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One tensor of the whole model.

    `holders`: the ranks that it is saved from, ascending. `memory`: stride, offset and elements of the storage that an
    unsharded save would hold it in, in elements, where that is not its own, whole and in row-major order.
    `distribution` is None for a plain tensor, which its holders hold alike. `signature` says all this, the same on all
    ranks.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory: tuple[tuple[int, ...], int, int] | None
    is_parameter: bool
    distribution: Distribution | None
    holders: tuple[int, ...]
    signature: str

    def twin(self) -> torch.Tensor:
        """A tensor without data that has this one's place in memory."""
        if self.memory is None:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        stride, offset, elements = self.memory
        return torch.empty(elements, dtype=self.dtype, device="meta").as_strided(self.shape, stride, offset)

    def stand_in(self) -> torch.Tensor:
        """What stands for the tensor on ranks that do not hold it: no data, and a parameter where it is one."""
        empty = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return nn.Parameter(empty, requires_grad=False) if self.is_parameter else empty


class Stages(Mapping[str, Member]):
    """The whole model, as all ranks see it alike; a mapping from names, in the order of the whole model.

    `extras`: what the descriptions say besides, and `first_ranks`: the lowest rank that gave each.
    """

    def __init__(self, texts: Sequence[str], ranks: Sequence[Sequence[int]]) -> None:
        """From the different descriptions (`encode`) by the lowest rank that gave each, and the ranks that did.

        Raises LayoutError, naming the tensor and two ranks, where they describe one name with different shapes or
        dtypes, or have models of different classes; CoverageError where nobody holds a shard of a tensor.
        """
        parts = [json.loads(text) for text in texts]
        first_ranks = [min(of_part) for of_part in ranks]
        self.first_ranks = tuple(first_ranks)
        _refuse_other_classes(parts, first_ranks)
        self.extras: tuple[Mapping[str, Any], ...] = tuple(part["extra"] for part in parts)
        self._members: dict[str, Member] = {}
        said: dict[str, list[tuple[int, list[Any], str]]] = {}
        for index, part in enumerate(parts):
            coded = [json.dumps(distribution) for distribution in part["distributions"]]
            for name, *fields, place in part["tensors"]:
                said.setdefault(name, []).append((index, fields, "" if place < 0 else coded[place]))
        distributions: dict[str, Distribution] = {}
        holders: dict[tuple[int, ...], tuple[tuple[int, ...], str]] = {}
        proven: set[tuple[str, tuple[int, ...]]] = set()
        for name in merged([[entry[0] for entry in part["tensors"]] for part in parts]):
            _, fields, place = said[name][0]
            _refuse_differences(name, said[name], first_ranks)
            # Ranks that have it on another mesh, as a copy of a tied weight may be, are left out of its save.
            alike = tuple(index for index, _, other in said[name] if other == place)
            if alike not in holders:
                of_these = tuple(sorted(rank for index in alike for rank in ranks[index]))
                holders[alike] = of_these, hashlib.sha256(repr(of_these).encode()).hexdigest()
            if place and place not in distributions:
                distributions[place] = _decoded(json.loads(place))
            if place and (place, alike) not in proven:
                _prove_held(name, distributions[place], holders[alike][0])
                proven.add((place, alike))
            shape, dtype, memory, is_parameter = fields
            said_of_it = repr((shape, dtype, memory, is_parameter, place, holders[alike][1]))
            self._members[name] = Member(
                shape=tuple(shape),
                dtype=getattr(torch, dtype),
                memory=None if memory is None else (tuple(memory[0]), memory[1], memory[2]),
                is_parameter=is_parameter,
                distribution=distributions[place] if place else None,
                holders=holders[alike][0],
                signature=hashlib.sha256(said_of_it.encode()).hexdigest(),
            )

    def __getitem__(self, name: str) -> Member:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def uncounted(self) -> int:
        """The elements of parameters that are not saved; of those that several stages have, once."""
        return sum({name: count for extra in self.extras for name, count in extra["uncounted"].items()}.values())

    def completed(self, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All tensors by name: this rank's own, and what stands for those of other ranks."""
        return {name: own[name] if name in own else member.stand_in() for name, member in self.items()}


def in_whole_model(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` of this rank's part of a model under the names that they have in the whole one.

    Those that are tied to a tensor of another stage have that one's name, and come first: where they stand in the whole
    model is for that stage to say.
    """
    ties = tied_elsewhere(model, tensors.keys())
    renamed = {ties[name]: tensors[name] for name in ties}
    return {**renamed, **{name: tensor for name, tensor in tensors.items() if name not in ties}}


def encode(
    cls: str,
    tensors: Mapping[str, tuple[torch.Tensor, bool, Distribution | None]],
    extra: Mapping[str, Any],
) -> str:
    """What a rank says of its part of a model of class `cls`: of each tensor its place in memory (on the meta device),
    whether it is a parameter, and how it is distributed. `extra`: whatever JSON holds."""
    coded: dict[int, str] = {}
    numbers: dict[str, int] = {}
    entries: list[list[Any]] = []
    for name, (twin, is_parameter, distribution) in tensors.items():
        place = -1
        if distribution is not None:
            if id(distribution) not in coded:
                coded[id(distribution)] = json.dumps(_coded(distribution))
            place = numbers.setdefault(coded[id(distribution)], len(numbers))
        elements = twin.untyped_storage().nbytes() // twin.element_size()
        memory = None
        if not (twin.is_contiguous() and elements == twin.numel()):
            memory = [list(twin.stride()), int(twin.storage_offset()), elements]
        dtype = str(twin.dtype).removeprefix("torch.")
        entries.append([name, list(twin.shape), dtype, memory, is_parameter, place])
    said = {"class": cls, "distributions": [json.loads(code) for code in numbers], "tensors": entries, "extra": extra}
    return json.dumps(said, separators=(",", ":"))


def merged(parts: Sequence[Sequence[str]]) -> list[str]:
    """The names of all parts in one order that has each part's: that of the whole, of which the parts are taken out.

    Where the parts leave it open, a lower number in the same place comes first (`layers.3.` before `layers.10.`), else
    what is in an earlier part. So stages that a rank holds several of, not next to each other, are put in between.
    """
    left = Counter(name for part in parts for name in part)
    queues = [deque(part) for part in parts]
    order: list[str] = []
    done: set[str] = set()
    while True:
        for queue in queues:
            while queue and queue[0] in done:
                queue.popleft()
        heads = [queue[0] for queue in queues if queue]
        if not heads:
            return order
        at_head = Counter(heads)
        ready = [name for name in heads if at_head[name] == left[name]] or heads[
            :1
        ]  # orders that contradict each other
        chosen = ready[0]
        for name in ready[1:]:
            if _precedes(name, chosen):
                chosen = name
        order.append(chosen)
        done.add(chosen)


def _precedes(name: str, other: str) -> bool:
    """Whether the first part in which the names differ is a number in both, and lower in `name`."""
    for one, two in zip(name.split("."), other.split("."), strict=False):
        if one != two:
            return one.isdecimal() and two.isdecimal() and int(one) < int(two)
    return False


def _refuse_other_classes(parts: Sequence[Mapping[str, Any]], first_ranks: Sequence[int]) -> None:
    for part, rank in zip(parts, first_ranks, strict=True):
        if part["class"] != parts[0]["class"]:
            raise LayoutError(
                f"rank {first_ranks[0]} has a {parts[0]['class']} and rank {rank} a {part['class']}; the stages of a "
                "pipeline must be of one class, that of the whole model, without the modules of the other stages"
            )


def _refuse_differences(name: str, said: Sequence[tuple[int, Sequence[Any], str]], first_ranks: Sequence[int]) -> None:
    first, fields, _ = said[0]
    for index, others, _ in said[1:]:
        if list(others[:2]) != list(fields[:2]) or others[3] != fields[3]:
            one, two = (f"{tuple(f[0])} {f[1]}{'' if f[3] else ' (no parameter)'}" for f in (fields, others))
            raise LayoutError(
                f"{name}: is {one} on rank {first_ranks[first]} and {two} on rank {first_ranks[index]}; a name that "
                "several stages of a pipeline have must be one tensor, held alike"
            )


def _prove_held(name: str, distribution: Distribution, holders: tuple[int, ...]) -> None:
    """Raise CoverageError unless some holder has each shard."""
    place = part_of(name, distribution.whole, distribution.ranks)
    sharded = [d for d, placement in enumerate(distribution.placements) if not isinstance(placement, Replicate)]
    wanted = {tuple(c[d] for d in sharded) for c in np.ndindex(*distribution.ranks.shape)}
    held = {tuple(c[d] for d in sharded) for c in coordinates_of(place, holders)}
    if wanted - held:
        raise CoverageError(
            f"{name}: no rank holds its shard {min(wanted - held)} of {distribution.placements} on a mesh of shape "
            f"{distribution.ranks.shape}; only ranks {str(holders)[1:60]} have this tensor"
        )


def _coded(distribution: Distribution) -> list[Any]:
    return [
        [_placement_code(placement) for placement in distribution.placements],
        distribution.whole.tolist(),
        distribution.ranks.tolist(),
    ]


def _placement_code(placement: Placement) -> list[int]:
    if isinstance(placement, _StridedShard):
        return [placement.dim, int(placement.split_factor)]
    return [placement.dim] if isinstance(placement, Shard) else []


def _decoded(coded: Sequence[Any]) -> Distribution:
    placements, whole, ranks = coded
    return Distribution(
        placements=tuple(map(_placement, placements)),
        whole=np.array(whole, dtype=np.int64),
        ranks=np.array(ranks, dtype=np.int64),
    )


def _placement(code: Sequence[int]) -> Placement:
    if len(code) == 2:
        return _StridedShard(code[0], split_factor=code[1])
    return Shard(code[0]) if code else Replicate()
