"""Keys whose values a conversion computes: which tensors of the model they are made of, and the conversion itself.

Most keys of a checkpoint are parts of tensors. Of a few models some are not: rows in another order, as in rotary
embeddings, or new values. These need their tensors whole, in one place, and Transformers' own operations run on them.

Source: transformers `core_model_loading.py` (`revert_weight_conversion`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from stillframe.errors import UnsupportedModel
from stillframe.layout.orientation import hub_orientation
from stillframe.layout.tracing import storage_id
from stillframe.wrappers import unsharded_classes, without_wrappers

_PREFIX = "computed "


def computed_name(name: str) -> str:
    """What a computed key, `name` in what the conversion returns, is called among a layout's sources: no tensor's name
    has a space."""
    return _PREFIX + name


class Conversion:
    """What `save_pretrained` makes of tensors of `model`, by their runtime names: those that its files have."""

    def __init__(self, model: nn.Module, *, hub_layout: bool) -> None:
        self._model = model
        self._hub_layout = hub_layout

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        orientation = hub_orientation(self._model) if self._hub_layout else nullcontext()
        with without_wrappers(self._model), unsharded_classes(self._model), orientation:
            converted = dict(tensors)
            if isinstance(self._model, PreTrainedModel):
                converted = revert_weight_conversion(self._model, converted)
            return converted

    def compute(
        self, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.dtype]
    ) -> dict[str, torch.Tensor]:
        """The computed keys `wanted` (as `computed_name` calls them), each of the dtype that it has in the files.

        As in the save of a model that was cast, tensors are cast before they are converted. `tensors` are whole, those
        that the keys are made of.
        """
        uncast = self({name: tensor.to("meta") for name, tensor in tensors.items()})
        by_cast: dict[torch.dtype | None, list[str]] = {}
        for name, dtype in wanted.items():
            cast = None if uncast[name.removeprefix(_PREFIX)].dtype == dtype else dtype
            by_cast.setdefault(cast, []).append(name)
        results: dict[str, torch.Tensor] = {}
        for cast, names in by_cast.items():
            given = {n: t if cast is None or not t.is_floating_point() else t.to(cast) for n, t in tensors.items()}
            converted = self(given)
            results |= {name: converted[name.removeprefix(_PREFIX)].contiguous() for name in names}
        return results


def sources_of_computed(
    conversion: Conversion, twins: Mapping[str, torch.Tensor], unmapped: Mapping[str, UnsupportedModel]
) -> dict[str, tuple[int, ...]]:
    """For each of the outputs `unmapped` (with why it has no runs) the numbers of the `twins`, data-free, that it is
    made of. Raises the reason of one that is made of none, or comes out otherwise when it is made of these alone."""
    tracer = _Dependencies(twins)
    with tracer:
        outputs = conversion(twins)
    made_of = {name: tuple(sorted(tracer.of(outputs[name]))) for name in unmapped}
    names = list(twins)
    for together in connected(list(made_of.values())):
        needed = sorted({index for number in together for index in list(made_of.values())[number]})
        keys = [list(made_of)[number] for number in together]
        try:
            alone = conversion({names[index]: twins[names[index]] for index in needed}) if needed else {}
        except Exception as error:
            raise unmapped[keys[0]] from error
        for key in keys:
            found, expected = alone.get(key), outputs[key]
            if found is None or (found.shape, found.dtype) != (expected.shape, expected.dtype):
                raise unmapped[key]
    return made_of


def connected(sets: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of `sets` in groups: those that have a member in common, directly or by others. In order of the
    first of each group."""
    parent = list(range(len(sets)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first_with: dict[int, int] = {}
    for number, members in enumerate(sets):
        for member in members:
            one, other = root(first_with.setdefault(member, number)), root(number)
            parent[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = {}
    for number in range(len(sets)):
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())


class _Dependencies(TorchFunctionMode):
    """Watches a conversion of data-free tensors, and knows of each tensor in it which inputs it depends on."""

    def __init__(self, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._inputs = {storage_id(tensor): frozenset((i,)) for i, tensor in enumerate(inputs.values())}
        self._made: dict[int, frozenset[int]] = {}
        # Storages are identified by address; keeping the tensors alive keeps the addresses unique.
        self._alive: list[torch.Tensor] = []

    def of(self, tensor: torch.Tensor) -> frozenset[int]:
        storage = storage_id(tensor)
        return self._inputs.get(storage, self._made.get(storage, frozenset()))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [*_tensors_in(args), *_tensors_in(kwargs)]
        versions = [tensor._version for tensor in given]
        result = func(*args, **(kwargs or {}))
        changed = [tensor for tensor, version in zip(given, versions, strict=True) if tensor._version != version]
        sources = frozenset[int]().union(*map(self.of, given))
        for tensor in (*_tensors_in(result), *changed):
            storage = storage_id(tensor)
            if storage not in self._inputs:
                self._made[storage] = self._made.get(storage, frozenset()) | sources
                self._alive.append(tensor)
        return result


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors_in(member)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for member in value:
            yield from _tensors_in(member)
