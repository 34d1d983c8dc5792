"""Optimizers get their state back whole, or keep what they had."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from stillframe.errors import ModelMismatch
from stillframe.state.restoring import OptimizerLoad, model_targets
from stillframe.state.tensors import tree_of
from stillframe.testing.models import tiny_qwen3
from stillframe.tree import StateTree


@dataclass(frozen=True)
class Described:
    dtype: torch.dtype
    shape: tuple[int, ...]


def described(tree: StateTree) -> dict[str, Described]:
    """As a directory would describe what was saved of `tree`."""
    tensors = {**tree.tensors, **{alias: tree.tensors[key] for alias, key in tree.aliases.items()}}
    return {key: Described(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def load(tree: StateTree, model: nn.Module, *optimizers: torch.optim.Optimizer, arguments: bool = True) -> None:
    """Load what was saved of `tree`."""
    into = OptimizerLoad(model, optimizers, described(tree), tree.paths)
    assert not into.targets.missing
    assert not into.targets.unexpected
    for key, target in into.targets.tensors.items():
        target.copy_(tree.tensors[key])
    into.put_in_place(tree.objects, arguments=arguments)


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_optimizer_goes_on_bit_for_bit(kind: str) -> None:
    model = nn.Linear(3, 4)
    optimizer = stepped(OPTIMIZERS[kind](model.parameters()), model)
    other = copy.deepcopy(model)
    restored = OPTIMIZERS[kind](other.parameters())
    load(tree_of(model, (optimizer,), save_frozen=True), other, restored)
    for _ in range(2):
        stepped(optimizer, model)
        stepped(restored, other)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    first, second = optimizer.state_dict(), restored.state_dict()
    assert str(first["param_groups"]) == str(second["param_groups"])
    assert str(first["state"]) == str(second["state"])


def test_arguments_can_be_left_as_they_are() -> None:
    model = nn.Linear(3, 4)
    tree = tree_of(model, (stepped(torch.optim.AdamW(model.parameters(), lr=0.1), model),), save_frozen=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.7, weight_decay=0.2)
    load(tree, model, optimizer, arguments=False)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.7, 0.2)
    assert optimizer.state[model.weight]["step"] == 1


def test_several_optimizers_are_one_state() -> None:
    model = nn.Linear(3, 4)
    both = [torch.optim.AdamW([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.2, momentum=0.5)]
    stepped(both[0], model)
    stepped(both[1], model)
    tree = tree_of(model, both, save_frozen=True)
    new = [torch.optim.AdamW([model.weight], lr=1.0), torch.optim.SGD([model.bias], lr=1.0)]
    load(tree, model, *new)
    assert [o.param_groups[0]["lr"] for o in new] == [0.1, 0.2]
    assert torch.equal(new[1].state[model.bias]["momentum_buffer"], both[1].state[model.bias]["momentum_buffer"])


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (lambda m: [{"params": [m.weight]}, {"params": [m.bias]}], "has 2 parameter groups, the checkpoint has 1"),
        (lambda m: [{"params": [m.weight]}], r"parameter group 0 .* only there: \['bias'\]"),
        (lambda m: [{"params": [m.bias, m.weight]}], "in another order"),
    ],
    ids=["more groups", "fewer parameters", "other order"],
)
def test_other_groups_are_refused_and_nothing_changes(groups: object, match: str) -> None:
    model = nn.Linear(3, 4)
    tree = tree_of(model, (stepped(torch.optim.AdamW(model.parameters(), lr=0.1), model),), save_frozen=True)
    optimizer = torch.optim.AdamW(groups(model), lr=0.5)  # type: ignore[operator]
    into = OptimizerLoad(model, (optimizer,), described(tree), tree.paths)
    with pytest.raises(ModelMismatch, match=match):
        into.put_in_place(tree.objects, arguments=True)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.5


def differences(
    model: nn.Module, stored: Mapping[str, Described], tree: StateTree, *, save_frozen: bool = True
) -> tuple:
    found = model_targets(model, stored, tree.paths, save_frozen=save_frozen)
    return found.missing, found.unexpected


def test_a_model_lacks_and_has_what_the_checkpoint_does_not() -> None:
    one, other = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False))
    tree = tree_of(one, (), save_frozen=True)
    assert differences(other, described(tree), tree) == (("model.1.weight",), ("model.0.bias",))


def test_either_name_of_a_tied_tensor_does() -> None:
    model = tiny_qwen3(tied=True)
    tree = tree_of(model, (), save_frozen=True)
    for kept, dropped in (("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")):
        stored = {key: value for key, value in described(tree).items() if key != f"model.{dropped}.weight"}
        found = model_targets(model, stored, tree.paths, save_frozen=True)
        assert (found.missing, found.unexpected) == ((), ())
        assert found.tensors[f"model.{kept}.weight"] is model.lm_head.weight


def test_frozen_parameters_may_be_absent_if_they_are_not_saved() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    whole = tree_of(model, (), save_frozen=True)
    part = {k: v for k, v in described(whole).items() if k.startswith("model.1")}
    assert differences(model, part, whole, save_frozen=False) == ((), ())
    assert differences(model, part, whole, save_frozen=True)[0] == ("model.0.weight", "model.0.bias")
    assert set(model_targets(model, described(whole), whole.paths, save_frozen=False).tensors) == set(whole.tensors)
