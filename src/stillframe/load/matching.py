"""What a directory's keys make of a model, against what the model has: ties, dtypes, what is missing or unexpected."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel

from stillframe.layout.runs import Runs
from stillframe.layout.runtime import address
from stillframe.load.folder import listed
from stillframe.load.keys import LoadKeys
from stillframe.load.safetensors import StoredTensor

_CASTS_FROM = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One tensor of the model and the runs that it is loaded from.

    `same_as`: where the files hold a tied tensor under several names, the runs of the others, by name; all must agree.
    """

    name: str
    tensor: torch.Tensor
    runs: Runs
    same_as: Mapping[str, Runs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What is loaded, and every difference: names of the model, keys of the files, and name -> what is wrong."""

    targets: tuple[Target, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    unfit: Mapping[str, str]

    def differences(self, *, strict: bool) -> str:
        """All differences in one text of bounded length; empty where there are none that matter."""
        found = []
        if strict and self.missing:
            found.append(f"{len(self.missing)} tensors of the model are not in the files: {listed(self.missing)}")
        if strict and self.unexpected:
            found.append(
                f"{len(self.unexpected)} keys in the files are unknown to the model: {listed(self.unexpected)}"
            )
        if self.unfit:
            reasons = [f"{name} {reason}" for name, reason in sorted(self.unfit.items())]
            found.append(f"{len(self.unfit)} do not fit: {listed(reasons)}")
        return "; ".join(found)


def match(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    keys: LoadKeys,
    stored: Mapping[str, StoredTensor],
    elsewhere: Mapping[str, str],
) -> Match:
    """Find for every tensor in `state`, the model's `state_dict`, what it is loaded from.

    A tied tensor is loaded if any of its names is in the files; `elsewhere` has those that only other stages of a
    pipeline have, by the name here. Missing and unexpected keys that Transformers ignores
    for this model do not count, nor do those missing that `save_pretrained` leaves out (`_keys_to_ignore_on_save`).
    """
    unfit = dict(keys.unfit)
    targets = []
    missing: list[list[str]] = []
    for names in _tied_in_memory(state):
        names += dict.fromkeys(elsewhere[name] for name in names if name in elsewhere)
        present = [name for name in names if name in keys.tensors] or list(_declared_ties(model, names, state, keys))
        wrong = {n: why for n in present if (why := _dtype_problem(keys, stored, n, state[names[0]].dtype))}
        unfit.update(wrong)
        if present and not wrong:
            first, *others = present
            targets.append(
                Target(
                    name=names[0],
                    tensor=state[names[0]],
                    runs=keys.tensors[first],
                    same_as={name: keys.tensors[name] for name in others},
                )
            )
        elif not present and not any(name in unfit for name in names):
            missing.append(names)
    still_missing, still_unexpected = _counted_by_transformers(model, missing, keys)
    return Match(targets=tuple(targets), missing=still_missing, unexpected=still_unexpected, unfit=unfit)


def _tied_in_memory(state: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names of each distinct tensor, in the order of the `state_dict`."""
    groups: dict[Hashable, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(address(tensor), []).append(name)
    return list(groups.values())


def _declared_ties(
    model: nn.Module, names: list[str], state: Mapping[str, torch.Tensor], keys: LoadKeys
) -> Iterator[str]:
    """A name that Transformers ties to one of `names` and that is in the files, where the model lost the tie itself.

    `model.to_empty` unties weights, for one; a save made before that holds only one of the names.
    """
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    roots = {ties.get(name, name) for name in names}
    for name in sorted({*ties.keys(), *ties.values()}):
        is_here = name in state and name in keys.tensors
        if is_here and ties.get(name, name) in roots and state[name].shape == state[names[0]].shape:
            yield name
            return


def _dtype_problem(keys: LoadKeys, stored: Mapping[str, StoredTensor], name: str, dtype: torch.dtype) -> str | None:
    """Why the stored dtypes cannot become `dtype`: only floating-point numbers of 16 bits and more are cast.

    An 8-bit one is meaningless without the scales stored beside it, and others lose more than precision.
    """
    for found in sorted({stored[key].dtype for key in keys.stored_keys(name)}, key=str):
        if found != dtype and not {found, dtype} <= _CASTS_FROM:
            return f"is {found} in the files, {dtype} in the model, which is not cast"
    return None


def _counted_by_transformers(
    model: nn.Module, missing: list[list[str]], keys: LoadKeys
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The missing names and unexpected keys that `from_pretrained` would report for this model; of any other: all."""
    if not isinstance(model, PreTrainedModel):
        return tuple(names[0] for names in missing), tuple(keys.unexpected)
    info = SimpleNamespace(
        missing_keys={name for names in missing for name in names} - set(model._keys_to_ignore_on_save or ()),
        unexpected_keys={name for names in keys.unexpected.values() for name in names},
    )
    model._adjust_missing_and_unexpected_keys(info)  # type: ignore[arg-type]  # it uses these two attributes only
    return (
        tuple(names[0] for names in missing if info.missing_keys.issuperset(names)),
        tuple(key for key, names in keys.unexpected.items() if not info.unexpected_keys.isdisjoint(names)),
    )
