"""Stored keys -> a model's tensors, found by running Transformers' own loading conversions on shapes alone.

The counterpart of `layout.keys.save_keys`: the keys of a directory go through the renamings and conversions that
`from_pretrained` would apply, on meta tensors, and what comes out says for every tensor of the model which runs of
which stored tensors it consists of; of a tensor whose values a conversion computes, which stored tensors are converted
for it (`load.computing` does that). So a directory may be in any form that Transformers reads (fused or per expert, as
on the Hub or as `save_pretrained` writes it), not only in the one that this model would be saved in.

Source: transformers `core_model_loading.py` (`convert_and_load_state_dict_in_model`), followed step by step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from stillframe.errors import UnsupportedModel
from stillframe.layout.keys import save_keys
from stillframe.layout.renaming import KeyMapping
from stillframe.layout.runs import Runs
from stillframe.layout.runtime import runtime_tensors
from stillframe.layout.tracing import Tracer, is_scattered
from stillframe.load.safetensors import StoredTensor
from stillframe.load.sources import Computed, Conversion, Permutation, Source
from stillframe.wrappers import unsharded_classes, without_wrappers


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadKeys:
    """What a directory's keys make of a model.

    `tensors`: name of a tensor of the model -> the runs that tile it, over `sources` and, numbered behind them,
    `computed`, each of which is a tensor of its own. `unexpected`: keys that become nothing that the model has -> the
    names that they would have. `unfit`: what cannot be loaded, name -> why.
    """

    sources: tuple[Source, ...]
    computed: tuple[Computed, ...] = ()
    tensors: Mapping[str, Runs]
    unexpected: Mapping[str, tuple[str, ...]]
    unfit: Mapping[str, str]

    def stored_keys(self, name: str) -> set[str]:
        """The stored tensors that the tensor `name` of the model is loaded from."""
        numbers = np.unique(self.tensors[name].source).tolist()
        stored = [n for n in numbers if n < len(self.sources)]
        for number in numbers[len(stored) :]:
            stored += self.computed[number - len(self.sources)].conversion.sources
        return {self.sources[number].key for number in stored}


def load_keys(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    stored: Mapping[str, StoredTensor],
    key_mapping: KeyMapping | None = None,
) -> LoadKeys:
    """What `stored`, by key, makes of `model`, whose `state_dict` is `state`. Reads no data.

    Shapes are global ones, however the model is sharded. `key_mapping` is the one that the keys were saved with. Raises
    UnsupportedModel where a conversion changes what is stored in place.
    """
    if key_mapping is None:
        return _unmapped_keys(model, state, stored)
    names = _names_before(model, state, key_mapping)
    # A key may look like a name that the mapping gives another key; it is not the one that is meant.
    taken = set(names.values())
    astray = {key: (key,) for key in stored if key not in names and key in taken}
    keys = _unmapped_keys(model, state, {names.get(key, key): stored[key] for key in stored if key not in astray})
    key_of = {names.get(key, key): key for key in stored if key not in astray}
    return replace(
        keys,
        sources=tuple(replace(source, key=key_of[source.key]) for source in keys.sources),
        unexpected=dict(sorted({**{key_of[key]: to for key, to in keys.unexpected.items()}, **astray}.items())),
    )


def _names_before(model: nn.Module, state: Mapping[str, torch.Tensor], key_mapping: KeyMapping) -> dict[str, str]:
    """Key that a save of `model` gives -> the key that it would have without the mapping.

    The names in the model itself are known too, where their keys are nobody else's: a save writes one name of a tied
    tensor, and experts may be stored as the model has them.
    """
    saved = [key.name for key in save_keys(model, runtime_tensors(model)).keys]
    names = {key: name for name, key in key_mapping.keys_of(saved).items()}
    for name in state:
        names.setdefault(key_mapping.key_of(name), name)
    return names


def _unmapped_keys(model: nn.Module, state: dict[str, torch.Tensor], stored: Mapping[str, StoredTensor]) -> LoadKeys:
    if isinstance(model, PreTrainedModel):
        return _converted_keys(model, state, stored)
    return _own_keys(state, stored)


def _own_keys(state: Mapping[str, torch.Tensor], stored: Mapping[str, StoredTensor]) -> LoadKeys:
    """What keys make of a module that has no conversions: each is a tensor of that name, or nothing."""
    tensors = {}
    unfit = {}
    for index, (name, tensor) in enumerate(stored.items()):
        if name in state and tensor.shape != tuple(state[name].shape):
            unfit[name] = _other_shape(tensor.shape, state[name].shape)
        elif name in state:
            size = math.prod(tensor.shape)
            tensors[name] = Runs.of([(0, index, 0, size)] if size else [])
    return LoadKeys(
        sources=tuple(Source(key=key) for key in stored),
        tensors=tensors,
        unexpected={key: (key,) for key in stored if key not in state},
        unfit=unfit,
    )


def _other_shape(stored: Sequence[int], wanted: Sequence[int]) -> str:
    return f"has shape {tuple(stored)} in the files, {tuple(wanted)} in the model"


def _converted_keys(
    model: PreTrainedModel, state: dict[str, torch.Tensor], stored: Mapping[str, StoredTensor]
) -> LoadKeys:
    """What keys make of a Transformers model, by its own conversions."""
    with unsharded_classes(model):
        groups, unexpected, unfit = _assign(model, state, stored)
        twins = {
            # In the model's dtype, as Transformers casts before it converts; runs count elements, of any size.
            key: torch.empty(stored[key].shape, dtype=state[group.target].dtype, device="meta")
            for group in groups
            for _, key in group.keys
        }
        tracer = _PermutingTracer(twins)
        converted = tracer.run(lambda inputs: _convert(model, groups, inputs, unfit))
    tensors = {}
    values: list[str] = []
    for name, tensor in converted.items():
        if name not in state:
            unfit[name] = "the stored keys convert to it, but the model has no such tensor"
        elif tensor.shape != state[name].shape:
            unfit[name] = _other_shape(tensor.shape, state[name].shape)
        else:
            try:
                tensors[name] = tracer.runs_of(name, tensor)
            except UnsupportedModel:  # no part of anything that is stored, or one in too many pieces
                values.append(name)
                continue
            assert tensors[name].covers(tensor.numel()), name
    conversions = _conversions_of(values, model, groups, twins)
    for number, name in enumerate(values, start=len(tracer.views)):
        size = converted[name].numel()
        tensors[name] = Runs.of([(0, number, 0, size)] if size else [])
    return LoadKeys(
        sources=tuple(tracer.views),
        computed=tuple(
            Computed(name=name, shape=tuple(converted[name].shape), conversion=conversions[name]) for name in values
        ),
        tensors=tensors,
        unexpected=unexpected,
        unfit=unfit,
    )


@dataclass(slots=True)
class _Group:
    """Keys that together become `target` (and, by a converter, maybe more), each with the pattern it matched.

    `made`: what they became in the end.
    """

    target: str
    converter: WeightConverter | None
    keys: list[tuple[str, str]] = field(default_factory=list)
    made: tuple[str, ...] = ()


def _conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """What `from_pretrained` applies to a model of this class, after the renamings that this very model came with.

    A `key_mapping` that was given to `from_pretrained` is undone by a save of that model, so files have the names
    from before it.
    """
    known: list[WeightTransform] = get_model_conversion_mapping(model)
    patterns = {_patterns(transform) for transform in known}
    own = [
        deepcopy(transform)  # renaming leaves marks, from which a save concludes what to undo
        for transform in getattr(model, "_weight_conversions", None) or ()
        if type(transform) is WeightRenaming and _patterns(transform) not in patterns
    ]
    return own + known


def _patterns(transform: WeightTransform) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """What tells renamings apart: scope, source and target patterns.

    As they are applied, not as they were given (`_original_source_patterns`): a save of the model rewrites the latter,
    for `reverse_transform` hands them on to be processed in place.
    """
    return transform.scope_prefix, tuple(transform.source_patterns), tuple(transform.target_patterns)


def _assign(
    model: PreTrainedModel, state: dict[str, torch.Tensor], stored: Iterable[str]
) -> tuple[list[_Group], dict[str, tuple[str, ...]], dict[str, str]]:
    """Sort keys into the groups that are converted together; also the unexpected and the contradictory ones."""
    conversions = _conversions(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, _Group] = {}
    unexpected: dict[str, tuple[str, ...]] = {}
    unfit: dict[str, str] = {}
    for key in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        converter = None if pattern is None else converter_of[pattern]
        if target not in state:
            names = [target] if converter is None else converter.target_patterns
            first = names[0]
            unexpected[key] = tuple(target.replace(first, name) for name in names)
            continue
        if target not in groups:
            groups[target] = _Group(target, deepcopy(converter))
        group = groups[target]
        together = group.converter is not None and pattern in group.converter.source_patterns
        if group.keys and not together:
            unfit[target] = f"more than one stored key is for it: {group.keys[0][1]} and {key}"
        else:
            group.keys.append((pattern or key, key))
    return [group for target, group in groups.items() if target not in unfit], unexpected, unfit


def _convert(
    model: PreTrainedModel, groups: Sequence[_Group], twins: Mapping[str, torch.Tensor], unfit: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Run the conversions; those that fail for the shapes that they are given go into `unfit`."""
    converted: dict[str, torch.Tensor] = {}
    for group in groups:
        if group.converter is None:
            _add(converted, group.target, twins[group.keys[0][1]], unfit)
            continue
        try:
            results = _converted(model, group, [twins[key] for _, key in group.keys])
        except Exception as error:  # noqa: BLE001 - any operation may raise anything; it is reported, with the keys
            unfit[group.target] = f"cannot be made of what is stored, {_summary(group)}: {error}"
            continue
        group.made = tuple(results)
        for name, tensor in results.items():
            _add(converted, name, tensor, unfit)
    return {name: tensor for name, tensor in converted.items() if name not in unfit}


def _converted(model: PreTrainedModel, group: _Group, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the group's converter makes of `tensors`, one for each of the group's keys."""
    assert group.converter is not None
    for (pattern, key), tensor in zip(group.keys, tensors, strict=True):
        group.converter.add_tensor(group.target, key, pattern, tensor)  # type: ignore[arg-type]  # as in a save
    results = group.converter.convert(group.target, model=model, config=model.config)
    return {name: found[0] if isinstance(found, list) else found for name, found in results.items()}


def _conversions_of(
    names: Sequence[str], model: PreTrainedModel, groups: Sequence[_Group], twins: Mapping[str, torch.Tensor]
) -> dict[str, Conversion]:
    """How the tensors `names` of the model, whose values are computed, are made; one object for those of one group."""
    wanted = set(names)
    number_of = {key: number for number, key in enumerate(twins)}
    conversions: dict[str, Conversion] = {}
    for group in groups:
        if wanted.isdisjoint(group.made):
            continue
        keys = [key for _, key in group.keys]

        def run(tensors: Sequence[torch.Tensor], group: _Group = group) -> dict[str, torch.Tensor]:
            with without_wrappers(model), unsharded_classes(model):
                return _converted(model, group, tensors)

        conversion = Conversion(
            sources=tuple(number_of[key] for key in keys),
            shapes=tuple(tuple(twins[key].shape) for key in keys),
            dtype=twins[keys[0]].dtype,
            run=run,
        )
        conversions |= dict.fromkeys(group.made, conversion)
    return conversions


def _summary(group: _Group) -> str:
    """How many keys there are of each kind that the converter takes: shows what is missing."""
    assert group.converter is not None
    counts = Counter(pattern for pattern, _ in group.keys)
    return ", ".join(f"{counts[pattern]} keys like {pattern}" for pattern in group.converter.source_patterns)


def _add(converted: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, unfit: dict[str, str]) -> None:
    if name in converted:
        unfit[name] = "more than one group of stored keys is for it, in different forms"
    converted[name] = tensor


class _PermutingTracer(Tracer):
    """Describes a transposed input as one run over a permuted view of it, not as a run per element."""

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        super().__init__(inputs)
        self.views = [Source(key=key) for key in inputs]

    def runs_of_view(self, name: str, index: int, offset: int, shape: Sequence[int], stride: Sequence[int]) -> Runs:
        if not is_scattered(shape, stride):
            return super().runs_of_view(name, index, offset, shape, stride)
        permutation = Permutation(offset=offset, shape=tuple(shape), stride=tuple(stride))
        self.views.append(Source(key=self.views[index].key, permutation=permutation))
        return Runs.of([(0, len(self.views) - 1, 0, math.prod(shape))])
