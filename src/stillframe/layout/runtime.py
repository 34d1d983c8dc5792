"""The model as it runs: whether it is one that can be saved, and the tensors that a save is made of.

Sources: transformers `modeling_utils.py` (`save_pretrained`, `remove_tied_weights_from_state_dict`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_utils import _get_tied_weight_keys

from stillframe.errors import UnsupportedModel
from stillframe.wrappers import unwrapped_module


def unwrapped(model: nn.Module, *, any_module: bool = False) -> nn.Module:
    """The model inside of its outermost wrappers. Raises UnsupportedModel if it must be a PreTrainedModel and is none:
    only with a key mapping may it be any module."""
    inner = unwrapped_module(model)
    if not any_module and not isinstance(inner, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(inner).__name__} is not a transformers PreTrainedModel, which would say how its files look; "
            "key_mapping={} saves and loads any module under its own names, and its rules rename them"
        )
    return inner


def refuse_unsupported(model: nn.Module) -> None:
    """Raise UnsupportedModel for models whose save is not made of their own tensors."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel(f"{type(model).__name__} is quantized; export the model that it was made from")
    if {"cpu", "disk"} & {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}:
        raise UnsupportedModel(f"{type(model).__name__} has offloaded modules; load it without a device_map")
    unready = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    if unready:
        raise UnsupportedModel(
            f"{type(model).__name__}: {len(unready)} parameters have no values yet (meta device), such as {unready[0]}"
        )


def runtime_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` would save, as the model's own objects, in `state_dict` order.

    Names in `_keys_to_ignore_on_save` and all but one name of tied weights are left out, by the rules of
    transformers' `remove_tied_weights_from_state_dict`. A module that is no PreTrainedModel declares no ties: there the
    first of the names in their order is kept, as safetensors' `save_model` does. Raises UnsupportedModel for entries
    that are no tensors.
    """
    state = model.state_dict(keep_vars=True)
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModel(
                f"{type(model).__name__}: {name} is a {type(value).__name__}, not a tensor; safetensors cannot hold it"
            )
    return without_tied(model, state)


def without_tied(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keep one name of each group that is one tensor; refuse tensors that overlap without being the same."""
    storages: dict[Hashable, dict[Hashable, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, tensor in state.items():
        storage, extent = address(tensor)
        storages[storage][extent].append(name)
    patterns = _get_tied_weight_keys(model)
    dropped: set[str] = set()
    for extents in storages.values():
        for names in extents.values():
            if isinstance(model, PreTrainedModel):
                tied = [n for n in sorted(names) if any(re.search(p, n) for p in patterns)]
            else:
                tied = sorted(names, reverse=True)
            dropped.update(tied[: len(names) - 1])  # when every name is declared as tied, the last one stays
            kept = [n for n in names if n not in dropped]
            if len(kept) > 1:
                raise UnsupportedModel(
                    f"{type(model).__name__}: {', '.join(sorted(kept))} are one tensor, but _tied_weights_keys "
                    f"({patterns}) does not say which name to keep; declare the tie on the model"
                )
        _refuse_partial_overlap(model, state, [names[0] for names in extents.values()])
    return {name: tensor for name, tensor in state.items() if name not in dropped}


def address(tensor: torch.Tensor) -> tuple[Hashable, Hashable]:
    """What identifies the storage, and the place in it, of the memory that this rank holds of `tensor`."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if local.numel() == 0 or local.device.type == "meta":
        return id(tensor), None  # nothing to point at: only the very same object is the same tensor
    storage = (local.device, local.untyped_storage().data_ptr())
    return storage, (local.data_ptr(), local.numel(), tuple(local.stride()))


def _refuse_partial_overlap(model: nn.Module, state: dict[str, torch.Tensor], names: list[str]) -> None:
    spans = []
    for name in names if len(names) > 1 else ():
        tensor = state[name]
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        last = sum((size - 1) * step for size, step in zip(local.shape, local.stride(), strict=True))
        spans.append((local.data_ptr(), local.data_ptr() + (last + 1) * local.element_size(), name))
    spans.sort()
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise UnsupportedModel(f"{type(model).__name__}: {name} and {other} overlap in memory but are not the same")


def twins_on_meta(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Data-free twins of the unsharded tensors, each in a storage of its own.

    A tensor alone in its storage keeps the storage's size, which `save_pretrained` counts; where several tensors
    share one, it clones them.
    """
    lodgers = Counter(address(t)[0] for t in tensors.values())
    twins = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) or lodgers[address(tensor)[0]] > 1:
            twins[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        elif tensor.device.type == "meta":
            twins[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        else:
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            storage = torch.empty(elements, dtype=tensor.dtype, device="meta")
            twins[name] = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return twins
