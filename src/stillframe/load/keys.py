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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from stillframe.errors import UnsupportedModel
from stillframe.layout.keys import save_keys
from stillframe.layout.renaming import KeyMapping
from stillframe.layout.runs import Runs
from stillframe.layout.runtime import runtime_tensors
from stillframe.layout.tracing import Tracer, is_scattered
from stillframe.load.converting import assign, conversions_of, convert
from stillframe.load.safetensors import StoredTensor
from stillframe.load.sources import Computed, Permutation, Source
from stillframe.wrappers import unsharded_classes


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
        groups, unexpected, unfit = assign(model, state, stored)
        twins = {
            # In the model's dtype, as Transformers casts before it converts; runs count elements, of any size.
            key: torch.empty(stored[key].shape, dtype=state[group.target].dtype, device="meta")
            for group in groups
            for _, key in group.keys
        }
        tracer = _PermutingTracer(twins)
        converted = tracer.run(lambda inputs: convert(model, groups, inputs, unfit))
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
    conversions = conversions_of(values, model, groups, twins)
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
