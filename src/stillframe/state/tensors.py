"""Model and optimizer as one nested state with the keys that torch's own state dicts have, and whether it changed.

Source of the keys: `torch.distributed.checkpoint.state_dict` (`get_model_state_dict`, `get_optimizer_state_dict`: names
of parameters in the place of numbers, without those of wrappers), `_nested_dict.flatten_state_dict` (dotted keys).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stillframe.errors import UnsupportedModel
from stillframe.tree import StateTree
from stillframe.wrappers import clean_name

MODEL = "model"
OPTIMIZER = "optimizer"


def tree_of(model: nn.Module, optimizers: Sequence[Optimizer], *, save_frozen: bool) -> StateTree:
    """The tensors and values of `model` (without its outermost wrappers) and its optimizers, as they are now.

    `save_frozen=False` leaves out parameters that do not require gradients. No data is read or copied. Raises
    UnsupportedModel for a parameter of an optimizer that the model does not have, and for names that clash.
    """
    frozen = set() if save_frozen else {id(p) for p in model.parameters() if not p.requires_grad}
    state = {
        name: value
        for name, value in _by_clean_name(model.state_dict(keep_vars=True)).items()
        if id(value) not in frozen
    }
    nested: dict[str, Any] = {MODEL: state}
    if optimizers:
        nested[OPTIMIZER] = _optimizer_state(model, optimizers)
    try:
        flat, paths = flatten_state_dict(nested)
    except ValueError as error:
        raise UnsupportedModel(f"two parts of the state have one name: {error}") from error
    parameters = {id(p) for p in model.parameters()}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    objects: dict[str, object] = {}
    first_key: dict[int, str] = {}
    rank_0_only = set()
    for key, value in flat.items():
        if not isinstance(value, torch.Tensor):
            objects[key] = value
        elif id(value) in first_key:
            aliases[key] = first_key[id(value)]
        else:
            first_key[id(value)] = key
            tensors[key] = value
            is_buffer = paths[key][0] == MODEL and id(value) not in parameters
            if is_buffer and not isinstance(value, DTensor):
                rank_0_only.add(key)
    return StateTree(
        tensors=tensors, aliases=aliases, rank_0_only=frozenset(rank_0_only), objects=objects, paths=dict(paths)
    )


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id of each parameter -> the first of its names, without those of wrappers."""
    return {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}


def _by_clean_name(state: Mapping[str, Any]) -> dict[str, Any]:
    cleaned = {clean_name(name): value for name, value in state.items()}
    if len(cleaned) != len(state):
        twice = [name for name in state if clean_name(name) != name and clean_name(name) in state]
        raise UnsupportedModel(f"{twice[:5]} have the names of other tensors once wrappers are taken off")
    return cleaned


def _optimizer_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    names = parameter_names(model)
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            strange = [tuple(p.shape) for p in group["params"] if id(p) not in names]
            if strange:
                raise UnsupportedModel(
                    f"{type(optimizer).__name__} has {len(strange)} parameters that are not the model's, of shapes "
                    f"{strange[:3]}; make the optimizer after the model is sharded, from model.parameters()"
                )
            groups.append({**group, "params": [names[id(p)] for p in group["params"]]})
        state.update({names[id(p)]: dict(of_one) for p, of_one in optimizer.state.items() if id(p) in names})
    return {"state": state, "param_groups": groups}


class WatchedOptimizers:
    """Tells, in less than a microsecond per tensor, whether optimizers hold the tensors that they were planned with."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._known = self._members()
        self._ids = [[*map(id, members)] for members in self._known]

    def unchanged(self) -> bool:
        """Whether parameters, groups and state are the same objects; what is no tensor may have other values."""
        return [[*map(id, members)] for members in self._members()] == self._ids

    def _members(self) -> list[list[object]]:
        """All that counts, as objects: kept alive, so that their ids are not reused."""
        members: list[list[object]] = []
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                members.append(group["params"])
                members.append([v for v in group.values() if isinstance(v, torch.Tensor)])
            for parameter, state in optimizer.state.items():
                members.append([parameter, *(v for v in state.values() if isinstance(v, torch.Tensor))])
        return members


def objects_now(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, object]:
    """The values now of what is no tensor in the optimizers: of a tree made from the same objects, its `objects`."""
    if not optimizers:
        return {}
    state = _optimizer_state(model, optimizers)
    of_parameters = {
        name: {k: v for k, v in of_one.items() if not isinstance(v, torch.Tensor)}
        for name, of_one in state["state"].items()
    }
    plain = {"state": {n: v for n, v in of_parameters.items() if v}, "param_groups": state["param_groups"]}
    flat, _ = flatten_state_dict({OPTIMIZER: plain})
    return {key: value for key, value in flat.items() if not isinstance(value, torch.Tensor)}
