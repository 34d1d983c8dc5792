"""Transformers' conversions from files to a model: which keys are converted together, and what they become.

Source: transformers `core_model_loading.py` (`convert_and_load_state_dict_in_model`), followed step by step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from stillframe.load.sources import Conversion
from stillframe.wrappers import unsharded_classes, without_wrappers


@dataclass(slots=True)
class Group:
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


def assign(
    model: PreTrainedModel, state: dict[str, torch.Tensor], stored: Iterable[str]
) -> tuple[list[Group], dict[str, tuple[str, ...]], dict[str, str]]:
    """Sort keys into the groups that are converted together; also the unexpected and the contradictory ones."""
    conversions = _conversions(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
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
            groups[target] = Group(target, deepcopy(converter))
        group = groups[target]
        together = group.converter is not None and pattern in group.converter.source_patterns
        if group.keys and not together:
            unfit[target] = f"more than one stored key is for it: {group.keys[0][1]} and {key}"
        else:
            group.keys.append((pattern or key, key))
    return [group for target, group in groups.items() if target not in unfit], unexpected, unfit


def convert(
    model: PreTrainedModel, groups: Sequence[Group], twins: Mapping[str, torch.Tensor], unfit: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Run the conversions; those that fail for the shapes that they are given go into `unfit`."""
    converted: dict[str, torch.Tensor] = {}
    for group in groups:
        if group.converter is None:
            _add(converted, group.target, twins[group.keys[0][1]], unfit)
            continue
        try:
            results = run_converter(model, group, [twins[key] for _, key in group.keys])
        except Exception as error:  # noqa: BLE001 - any operation may raise anything; it is reported, with the keys
            unfit[group.target] = f"cannot be made of what is stored, {_summary(group)}: {error}"
            continue
        group.made = tuple(results)
        for name, tensor in results.items():
            _add(converted, name, tensor, unfit)
    return {name: tensor for name, tensor in converted.items() if name not in unfit}


def run_converter(model: PreTrainedModel, group: Group, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the group's converter makes of `tensors`, one for each of the group's keys."""
    assert group.converter is not None
    for (pattern, key), tensor in zip(group.keys, tensors, strict=True):
        group.converter.add_tensor(group.target, key, pattern, tensor)  # type: ignore[arg-type]  # as in a save
    results = group.converter.convert(group.target, model=model, config=model.config)
    return {name: found[0] if isinstance(found, list) else found for name, found in results.items()}


def conversions_of(
    names: Sequence[str], model: PreTrainedModel, groups: Sequence[Group], twins: Mapping[str, torch.Tensor]
) -> dict[str, Conversion]:
    """How the tensors `names` of the model, whose values are computed, are made; one object for those of one group."""
    wanted = set(names)
    number_of = {key: number for number, key in enumerate(twins)}
    conversions: dict[str, Conversion] = {}
    for group in groups:
        if wanted.isdisjoint(group.made):
            continue
        keys = [key for _, key in group.keys]

        def run(tensors: Sequence[torch.Tensor], group: Group = group) -> dict[str, torch.Tensor]:
            with without_wrappers(model), unsharded_classes(model):
                return run_converter(model, group, tensors)

        conversion = Conversion(
            sources=tuple(number_of[key] for key in keys),
            shapes=tuple(tuple(twins[key].shape) for key in keys),
            dtype=twins[keys[0]].dtype,
            run=run,
        )
        conversions |= dict.fromkeys(group.made, conversion)
    return conversions


def _summary(group: Group) -> str:
    """How many keys there are of each kind that the converter takes: shows what is missing."""
    assert group.converter is not None
    counts = Counter(pattern for pattern, _ in group.keys)
    return ", ".join(f"{counts[pattern]} keys like {pattern}" for pattern in group.converter.source_patterns)


def _add(converted: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, unfit: dict[str, str]) -> None:
    if name in converted:
        unfit[name] = "more than one group of stored keys is for it, in different forms"
    converted[name] = tensor
