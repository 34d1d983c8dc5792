"""Wrappers taken off and put back: names as they were before, and afterwards the very same modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from stillframe.wrappers import clean_name, unwrapped_module, without_wrappers


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "checkpoint": checkpoint_wrapper,
    "compile of checkpoint": lambda module: compiled(checkpoint_wrapper(module)),
    "checkpoint of compile": lambda module: checkpoint_wrapper(compiled(module)),
}


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))


def names(model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    modules = [name for name, _ in model.named_modules()]
    return modules, [name for name, _ in model.named_parameters()], list(model.state_dict())


@pytest.mark.parametrize("how", WRAPS)
def test_inside_the_context_all_names_are_those_of_the_model_without_wrappers(how: str) -> None:
    wrap = WRAPS[how]
    plain = nn.ModuleDict({"a": block(), "b": block()})
    inner = block()
    inner[0] = wrap(inner[0])
    wrapped = nn.ModuleDict({"a": wrap(inner), "b": block()})
    before = [(name, id(module)) for name, module in wrapped.named_modules()]
    assert names(wrapped) != names(plain)
    with without_wrappers(wrapped):
        assert names(wrapped) == names(plain)
        assert wrapped.get_parameter("a.0.weight") is next(inner.parameters())
    assert [(name, id(module)) for name, module in wrapped.named_modules()] == before
    assert [clean_name(name) for name in names(wrapped)[1]] == names(plain)[1]


def test_wrappers_are_back_after_an_error() -> None:
    model = nn.Sequential(compiled(block()), checkpoint_wrapper(block()))
    before = list(model)
    with pytest.raises(AttributeError, match=r"no attribute .absent"), without_wrappers(model):
        model.get_parameter("absent")
    assert list(model) == before


def test_a_module_that_is_used_twice_is_unwrapped_in_both_places() -> None:
    shared = compiled(block())
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    with without_wrappers(model):
        assert model["a"] is model["b"][0] is unwrapped_module(shared)
    assert model["a"] is model["b"][0] is shared


@pytest.mark.parametrize("how", WRAPS)
def test_outermost_wrappers_are_seen_through(how: str) -> None:
    inner = block()
    assert unwrapped_module(WRAPS[how](inner)) is inner
    assert unwrapped_module(inner) is inner


def test_a_module_with_tensors_of_its_own_is_no_wrapper() -> None:
    class Scaled(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module
            self.scale = nn.Parameter(torch.ones(1))

    model = nn.Sequential(Scaled(block()))
    before = names(model)
    with without_wrappers(model):
        assert names(model) == before
    assert unwrapped_module(model[0]) is model[0]


def test_a_name_that_only_resembles_a_wrappers_stays() -> None:
    assert clean_name("a._orig_mod.b._checkpoint_wrapped_module._orig_mod.c") == "a.b.c"
    assert clean_name("a._orig_mod_.my_orig_mod.weight") == "a._orig_mod_.my_orig_mod.weight"
