"""A saved state back into model and optimizers: where each stored tensor goes, and what is put in place afterwards.

Optimizers get new tensors, which take the place of theirs only once everything is read; until then nothing of them has
changed. A model's tensors are filled in place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stillframe.errors import ModelMismatch
from stillframe.state.tensors import MODEL, OPTIMIZER, parameter_names, tree_of
from stillframe.tree import KeyPath


class Stored(Protocol):
    """What a directory says of a tensor that it holds."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Where stored tensors go, by stored key; `missing`: keys that the state needs and the directory does not hold;
    `unexpected`: keys that it holds and the state has no place for. `same_as`: further stored keys of tied tensors, and
    the key in `tensors` whose values they must have."""

    tensors: Mapping[str, torch.Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    same_as: Mapping[str, str] = field(default_factory=dict)


def model_targets(
    model: nn.Module,
    stored: Mapping[str, Stored],
    paths: Mapping[str, KeyPath],
    *,
    save_frozen: bool,
    of_others: Collection[str] = (),
) -> Targets:
    """The tensors of `model` by the keys under which they are stored; tied ones need one of their names.

    Where `save_frozen` is False, frozen parameters may be absent; they are loaded where they are there. `of_others`:
    keys of the model that other stages of a pipeline have.
    """
    tree = tree_of(model, (), save_frozen=True)
    needed = tree if save_frozen else tree_of(model, (), save_frozen=False)
    names: dict[str, list[str]] = {key: [key] for key in tree.tensors}
    for alias, key in tree.aliases.items():
        names[key].append(alias)
    tensors, missing = {}, []
    same_as: dict[str, str] = {}
    for key, tensor in tree.tensors.items():
        found = [name for name in names[key] if name in stored]
        if found:
            tensors[found[0]] = tensor
            same_as.update(dict.fromkeys(found[1:], found[0]))
        elif key in needed.tensors:
            missing.append(key)
    known = {*tree.tensors, *tree.aliases, *of_others}
    unexpected = [key for key, path in paths.items() if path[0] == MODEL and key in stored and key not in known]
    return Targets(tensors=tensors, missing=tuple(missing), unexpected=tuple(unexpected), same_as=same_as)


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
        *,
        of_others: Collection[str] = (),
    ) -> None:
        """`of_others`: keys of the model that other stages of a pipeline have, whose parameters have state there."""
        self._optimizers = optimizers
        self._names = parameter_names(model)
        own = set(self._names.values())
        self._elsewhere = {key.removeprefix(f"{MODEL}.") for key in of_others} - own
        self._parameters = {self._names[id(p)]: p for p in model.parameters()}
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
                if path[2] not in self._elsewhere:
                    unexpected.append(key)
            else:
                tensors[key] = self._like(key, parameter, path[3:], stored[key])
        self.targets = Targets(tensors=tensors, missing=(), unexpected=tuple(unexpected))

    def put_in_place(self, objects: Mapping[str, object], *, arguments: bool) -> None:
        """Give the optimizers the tensors of `targets`, now filled, and `objects` (by key); what has no saved state has
        none afterwards.

        `arguments=False` leaves the groups' own (lr, betas, weight_decay, ...) as they are. Raises ModelMismatch, with
        nothing changed, as `refuse_other_groups` does.
        """
        saved_groups = self.refuse_other_groups(objects, arguments=arguments)
        values = self._values(objects)
        state: dict[int, dict[Any, Any]] = {id(p): {} for _, group in self._groups() for p in group["params"]}
        for path, value in values.items():
            if path[1] == "state" and path[2] not in self._elsewhere:
                _set(state[id(self._parameters[str(path[2])])], path[3:], value)
        for optimizer, group in self._groups():
            for parameter in group["params"]:
                if state[id(parameter)]:
                    optimizer.state[parameter] = _with_lists(state[id(parameter)])
                else:
                    optimizer.state.pop(parameter, None)
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

    def _values(self, objects: Mapping[str, object]) -> dict[KeyPath, object]:
        values: dict[KeyPath, object] = {}
        for key, path in self._paths.items():
            if key in self.targets.tensors:
                values[path] = self.targets.tensors[key]
            elif key in objects:
                values[path] = objects[key]
        return values

    def _saved_groups(self, values: Mapping[KeyPath, object]) -> list[dict[str, Any]]:
        groups: dict[int, dict[str, Any]] = {}
        for path, value in values.items():
            if path[1] == "param_groups":
                _set(groups.setdefault(int(path[2]), {}), path[3:], value)
        return [_with_lists(groups[index]) for index in sorted(groups)]

    def refuse_other_groups(self, objects: Mapping[str, object], *, arguments: bool) -> list[dict[str, Any]]:
        """The saved groups; raises ModelMismatch where the optimizers' own hold other parameters, or (`arguments`) are
        those of another kind of optimizer."""
        saved_groups = self._saved_groups(self._values(objects))
        self._refuse_other_parameters(saved_groups)
        for (optimizer, group), saved in zip(self._groups(), saved_groups, strict=True):
            added, lost = sorted(group.keys() - saved.keys()), sorted(saved.keys() - group.keys() - {"initial_lr"})
            if arguments and added and lost:
                raise ModelMismatch(
                    f"the checkpoint is that of another kind of optimizer than {type(optimizer).__name__}: its groups "
                    f"have {', '.join(lost)}, and not {', '.join(added)}"
                )
        return saved_groups

    def _refuse_other_parameters(self, saved_groups: Sequence[Mapping[str, Any]]) -> None:
        own = [[self._names[id(p)] for p in group["params"]] for _, group in self._groups()]
        saved = [[p for p in group.get("params", ()) if p not in self._elsewhere] for group in saved_groups]
        if own == saved or (self._elsewhere and [*map(sorted, own)] == [*map(sorted, saved)]):
            return  # a tied weight may stand elsewhere in a stage than in the whole model
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


def _with_lists(state: Any) -> Any:
    """`state` with lists where its paths had numbers: dicts have text for keys in a flattened state."""
    if not isinstance(state, dict):
        return state
    if state and all(type(key) is int for key in state):
        return [_with_lists(state[index]) for index in sorted(state)]
    return {key: _with_lists(value) for key, value in state.items()}
