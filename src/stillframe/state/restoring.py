"""A saved state back into model and optimizers: where each stored tensor goes, and what is put in place afterwards.

Optimizers get new tensors, which take the place of theirs only once everything is read; until then nothing of them has
changed. A model's tensors are filled in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stillframe.errors import ModelMismatch
from stillframe.state.tensors import MODEL, OPTIMIZER, parameter_names, tree_of
from stillframe.tree import KeyPath
from stillframe.wrappers import clean_name


class Stored(Protocol):
    """What a directory says of a tensor that it holds."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Where stored tensors go, by stored key; `missing`: keys that the state needs and the directory does not hold;
    `unexpected`: keys that it holds and the state has no place for."""

    tensors: Mapping[str, torch.Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def model_targets(
    model: nn.Module, stored: Mapping[str, Stored], paths: Mapping[str, KeyPath], *, save_frozen: bool
) -> Targets:
    """The tensors of `model` by the keys under which they are stored; tied ones need one of their names.

    Where `save_frozen` is False, frozen parameters may be absent; they are loaded where they are there.
    """
    tree = tree_of(model, (), save_frozen=True)
    needed = tree if save_frozen else tree_of(model, (), save_frozen=False)
    names: dict[str, list[str]] = {key: [key] for key in tree.tensors}
    for alias, key in tree.aliases.items():
        names[key].append(alias)
    tensors, missing = {}, []
    for key, tensor in tree.tensors.items():
        found = next((name for name in names[key] if name in stored), None)
        if found is not None:
            tensors[found] = tensor
        elif key in needed.tensors:
            missing.append(key)
    known = tree.tensors.keys() | tree.aliases.keys()
    unexpected = [key for key, path in paths.items() if path[0] == MODEL and key in stored and key not in known]
    return Targets(tensors=tensors, missing=tuple(missing), unexpected=tuple(unexpected))


class OptimizerLoad:
    """The load of optimizers from a stored state: first `targets` are filled, then `put_in_place`.

    Every stored value of a parameter's state gets a tensor: one like the optimizer's own where it has one already, else
    one distributed as the parameter is, if it has the parameter's shape, else a plain one on the CPU (a step count).
    Raises ModelMismatch for a state that fits neither.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        stored: Mapping[str, Stored],
        paths: Mapping[str, KeyPath],
    ) -> None:
        self._optimizers = optimizers
        self._names = parameter_names(model)
        self._parameters = {clean_name(name): p for name, p in model.named_parameters()}
        self._groups_of = {id(p): group for _, group in self._groups() for p in group["params"]}
        self._owner = {id(p): o for o, group in self._groups() for p in group["params"]}
        self._paths = {key: path for key, path in paths.items() if path[0] == OPTIMIZER}
        tensors: dict[str, torch.Tensor] = {}
        unexpected = []
        for key, path in self._paths.items():
            if key not in stored:
                continue
            parameter = self._parameters.get(str(path[2])) if path[1] == "state" else None
            if path[1] == "param_groups":
                tensors[key] = torch.empty(stored[key].shape, dtype=stored[key].dtype)
            elif parameter is None or id(parameter) not in self._owner:
                unexpected.append(key)
            else:
                tensors[key] = self._like(key, parameter, path[3:], stored[key])
        with_state = {str(path[2]) for path in self._paths.values() if path[1] == "state"}
        live = {
            self._names[id(p)] for o in optimizers for p, state in o.state.items() if state and id(p) in self._names
        }
        missing = tuple(f"{OPTIMIZER}.state.{name}" for name in sorted(live - with_state))
        self.targets = Targets(tensors=tensors, missing=missing, unexpected=tuple(unexpected))

    def put_in_place(self, objects: Mapping[str, object], *, arguments: bool) -> None:
        """Give the optimizers the tensors of `targets`, now filled, and `objects` (by key).

        `arguments=False` leaves the groups' own (lr, betas, weight_decay, ...) as they are. Raises ModelMismatch, with
        nothing changed, where the groups hold other parameters than the saved ones did.
        """
        values: dict[KeyPath, object] = {}
        for key, path in self._paths.items():
            if key in self.targets.tensors:
                values[path] = self.targets.tensors[key]
            elif key in objects:
                values[path] = objects[key]
        saved_groups = self._saved_groups(values)
        self._refuse_other_groups(saved_groups)
        state: dict[int, dict[Any, Any]] = {id(p): {} for _, group in self._groups() for p in group["params"]}
        for path, value in values.items():
            if path[1] == "state":
                _set(state[id(self._parameters[str(path[2])])], path[3:], value)
        for optimizer, group in self._groups():
            for parameter in group["params"]:
                if state[id(parameter)]:
                    optimizer.state[parameter] = state[id(parameter)]
        if arguments:
            for (_, group), saved in zip(self._groups(), saved_groups, strict=True):
                group.update({name: value for name, value in saved.items() if name != "params"})

    def _groups(self) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield optimizer, group

    def _like(self, key: str, parameter: torch.Tensor, path: KeyPath, stored: Stored) -> torch.Tensor:
        current: Any = self._owner[id(parameter)].state.get(parameter, {})
        for part in path:
            current = current.get(part) if isinstance(current, Mapping) else None
        if isinstance(current, torch.Tensor) and tuple(current.shape) == stored.shape:
            return torch.empty_like(current, dtype=stored.dtype)
        if stored.shape == tuple(parameter.shape) and stored.shape:
            return torch.empty_like(parameter, dtype=stored.dtype, requires_grad=False)
        if len(stored.shape) and isinstance(parameter, DTensor):
            raise ModelMismatch(
                f"{key} has the shape {stored.shape}, other than its parameter's {tuple(parameter.shape)}, and the "
                "optimizer has no such state yet to tell how it is distributed; take one optimizer step before resuming"
            )
        group = self._groups_of[id(parameter)]
        on_device = path[0] != "step" or group.get("fused") or group.get("capturable")
        return torch.empty(stored.shape, dtype=stored.dtype, device=parameter.device if on_device else "cpu")

    def _saved_groups(self, values: Mapping[KeyPath, object]) -> list[dict[str, Any]]:
        groups: dict[int, dict[str, Any]] = {}
        for path, value in values.items():
            if path[1] == "param_groups":
                _set(groups.setdefault(int(path[2]), {}), path[3:], value)
        return [groups[index] for index in sorted(groups)]

    def _refuse_other_groups(self, saved_groups: Sequence[Mapping[str, Any]]) -> None:
        own = [[self._names[id(p)] for p in group["params"]] for _, group in self._groups()]
        saved = [list(group.get("params", ())) for group in saved_groups]
        if own == saved:
            return
        if len(own) != len(saved):
            raise ModelMismatch(f"the optimizer has {len(own)} parameter groups, the checkpoint has {len(saved)}")
        index = next(i for i, (one, other) in enumerate(zip(own, saved, strict=True)) if one != other)
        extra = sorted(set(own[index]) - set(saved[index]))[:5]
        absent = sorted(set(saved[index]) - set(own[index]))[:5]
        what = f"not in the checkpoint's: {extra}; only there: {absent}" if extra or absent else "in another order"
        raise ModelMismatch(f"parameter group {index} of the optimizer holds other parameters than were saved: {what}")


def _set(state: dict[Any, Any], path: KeyPath, value: object) -> None:
    for part in path[:-1]:
        state = state.setdefault(part, {})
    state[path[-1]] = value
