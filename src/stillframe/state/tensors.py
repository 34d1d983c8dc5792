"""Model and optimizer as one nested state with the keys that torch's own state dicts have, and whether it changed.

Source of the keys: `torch.distributed.checkpoint.state_dict` (`get_model_state_dict`, `get_optimizer_state_dict`: names
of parameters in the place of numbers, without those of wrappers), `_nested_dict.flatten_state_dict` (dotted keys).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.optim import Optimizer

from stillframe.errors import UnsupportedModel
from stillframe.names import is_unicode
from stillframe.state.objects import refuse_unsafe
from stillframe.ties import tied_elsewhere
from stillframe.tree import StateTree
from stillframe.wrappers import clean_name

MODEL = "model"
OPTIMIZER = "optimizer"
_PLAIN = (type(None), bool, int, float, str)


def tree_of(model: nn.Module, optimizers: Sequence[Optimizer], *, save_frozen: bool) -> StateTree:
    """The tensors and values of `model` (without its outermost wrappers) and its optimizers, as they are now.

    `save_frozen=False` leaves out parameters that do not require gradients. No data is read or copied. Raises
    UnsupportedModel for a parameter of an optimizer that the model does not have, or that two optimizers have; for
    names that clash; for modules with an extra state of their own, and tensors whose elements share memory.
    """
    frozen = set() if save_frozen else {id(p) for p in model.parameters() if not p.requires_grad}
    state = {
        name: value
        for name, value in _with_ties(model, _by_clean_name(model.state_dict(keep_vars=True))).items()
        if id(value) not in frozen
    }
    extra = [name for name in state if name.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX]
    if extra:
        raise UnsupportedModel(f"{extra[0]}: a module's get_extra_state() is not saved; pass that module as `stateful`")
    nested: dict[str, Any] = {MODEL: state}
    if optimizers:
        nested[OPTIMIZER] = _optimizer_state(model, optimizers)
    try:
        flat, paths = flatten_state_dict(nested)
    except ValueError as error:
        raise UnsupportedModel(f"two parts of the state have one name: {error}") from error
    strange = [key for key in flat if not is_unicode(key)]
    if strange:
        raise UnsupportedModel(
            f"the name {strange[0]!r} is not valid Unicode, so no file can hold it; rename the tensor"
        )
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
            _refuse_shared_elements(key, value)
            is_buffer = paths[key][0] == MODEL and id(value) not in parameters
            if is_buffer and not isinstance(value, DTensor):
                rank_0_only.add(key)
    return StateTree(
        tensors=tensors, aliases=aliases, rank_0_only=frozenset(rank_0_only), objects=objects, paths=dict(paths)
    )


def _refuse_shared_elements(key: str, tensor: torch.Tensor) -> None:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if any(step == 0 and size > 1 for size, step in zip(local.shape, local.stride(), strict=True)):
        raise UnsupportedModel(
            f"{key} is an expanded tensor, whose elements share memory and cannot be put back; clone it"
        )


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id of each parameter -> the first of its names, without those of wrappers; of one that is tied to a parameter
    which only another stage of a pipeline has, that one's."""
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    ties = tied_elsewhere(model, set(names.values()))
    return {identity: ties.get(name, name) for identity, name in names.items()}


def _with_ties(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """`state`, and its tensors that are tied to one which only another stage has under that one's name too, first."""
    ties = tied_elsewhere(model, state.keys())
    return {**{ties[name]: state[name] for name in ties}, **state}


def _by_clean_name(state: Mapping[str, Any]) -> dict[str, Any]:
    cleaned = {clean_name(name): value for name, value in state.items()}
    if len(cleaned) != len(state):
        twice = [name for name in state if clean_name(name) != name and clean_name(name) in state]
        raise UnsupportedModel(f"{twice[:5]} have the names of other tensors once wrappers are taken off")
    return cleaned


def _optimizer_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    names = parameter_names(model)
    owners = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    shared = [names.get(owned, "a parameter") for owned, count in owners.items() if count > 1]
    if shared:
        raise UnsupportedModel(f"several optimizers (or groups) have {', '.join(shared[:5])}; each parameter needs one")
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


_Members = list[tuple[tuple[object, ...], list[object]]]


class WatchedOptimizers:
    """Tells, in about a microsecond per tensor, whether optimizers hold what they were planned with."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._known = self._members()  # kept alive, so that ids are not reused
        self._ids = _identities(self._known)

    def unchanged(self) -> bool:
        """Whether parameters, groups and state are the same objects under the same names; what is no tensor may have
        other values."""
        return _identities(self._members()) == self._ids

    def _members(self) -> _Members:
        """Of every group and every parameter's state: its names, and its tensors."""
        members: _Members = []
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                members.append((tuple(group), [*group["params"], *_tensors_in(group, leave_out="params")]))
            for parameter, state in optimizer.state.items():
                members.append((tuple(state), [parameter, *_tensors_in(state)]))
        return members


def _tensors_in(values: Mapping[Any, Any], *, leave_out: str | None = None) -> list[torch.Tensor]:
    """The tensors among `values` and in what is nested there."""
    found: list[torch.Tensor] = []
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (Mapping, list)) and name != leave_out:
            inner = value if isinstance(value, Mapping) else dict(enumerate(value))
            found += _tensors_in(inner)
    return found


def _identities(
    members: Sequence[tuple[tuple[object, ...], list[object]]],
) -> list[tuple[tuple[object, ...], list[int]]]:
    return [(names, [*map(id, objects)]) for names, objects in members]


def objects_now(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, object]:
    """The values now of what is no tensor in the optimizers: of a tree made from the same objects, its `objects`.

    NumPy's numbers become Python's. Raises OptionError for a value that could not be read back without executing code.
    """
    if not optimizers:
        return {}
    state = _optimizer_state(model, optimizers)
    of_parameters = {name: _without_tensors(of_one) for name, of_one in state["state"].items()}
    plain = {"state": {n: v for n, v in of_parameters.items() if v}, "param_groups": state["param_groups"]}
    flat, _ = flatten_state_dict({OPTIMIZER: plain})
    return {key: _plain(key, value) for key, value in flat.items() if not isinstance(value, torch.Tensor)}


def _without_tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a parameter's state is no tensor; what is nested stays whole, for its places count."""
    return {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}


def _plain(key: str, value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    parts = value if isinstance(value, list | tuple) and type(value) in (list, tuple) else (value,)
    if not all(type(part) in _PLAIN for part in parts):
        refuse_unsafe(f"{key} of the optimizer", value)
    return value
