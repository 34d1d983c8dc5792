"""The keys of a run's state are those of torch's own state dicts, and a change of its tensors is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from transformers import PreTrainedModel

from stillframe.errors import OptionError, UnsupportedModel
from stillframe.state.tensors import WatchedOptimizers, objects_now, tree_of
from stillframe.testing.models import tiny_batch, tiny_qwen3, tiny_qwen3_vl_moe


def trained(model: PreTrainedModel) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**tiny_batch(model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("save_frozen", [True, False])
def test_keys_paths_and_tensors_are_those_of_torch(save_frozen: bool) -> None:
    model = tiny_qwen3_vl_moe()
    model.model.visual.requires_grad_(False)
    optimizer = trained(model)
    options = StateDictOptions(ignore_frozen_params=not save_frozen)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    expected, paths = flatten_state_dict({"model": model_state, "optimizer": optimizer_state})

    tree = tree_of(model, (optimizer,), save_frozen=save_frozen)

    found = {**tree.tensors, **{alias: tree.tensors[key] for alias, key in tree.aliases.items()}, **tree.objects}
    assert found.keys() == expected.keys()
    assert {key: tuple(path) for key, path in tree.paths.items()} == {k: tuple(p) for k, p in paths.items()}
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert tree.tensors[key].data_ptr() == value.data_ptr()
        else:
            assert tree.objects[key] == value
    assert objects_now(model, (optimizer,)) == dict(tree.objects)


def test_a_tied_tensor_is_there_once_with_both_names() -> None:
    tree = tree_of(tiny_qwen3(tied=True), (), save_frozen=True)
    assert tree.aliases == {"model.lm_head.weight": "model.model.embed_tokens.weight"}
    assert "model.lm_head.weight" not in tree.tensors
    assert tree.paths["model.lm_head.weight"] == ("model", "lm_head.weight")


def test_a_name_that_no_file_can_hold_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("bad\udc80", torch.zeros(2))
    with pytest.raises(UnsupportedModel, match=r"the name 'model\.bad\\udc80' is not valid Unicode"):
        tree_of(model, (), save_frozen=True)


def test_buffers_are_rank_0s_and_parameters_everybodys() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tree = tree_of(model, (), save_frozen=True)
    assert tree.rank_0_only == {f"model.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled])
def test_names_of_wrappers_are_left_out(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    expected = tree_of(plain, (torch.optim.SGD(plain.parameters(), lr=0.1),), save_frozen=True)
    wrapped = nn.Sequential(wrap(nn.Linear(3, 4)), nn.Linear(4, 2))
    found = tree_of(wrapped, (torch.optim.SGD(wrapped.parameters(), lr=0.1),), save_frozen=True)
    assert found.paths == expected.paths
    assert found.objects == expected.objects


def test_a_foreign_parameter_in_the_optimizer_is_refused() -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(7))], lr=0.1)
    with pytest.raises(UnsupportedModel, match=r"SGD has 1 parameters that are not the model's, of shapes \[\(7,\)\]"):
        tree_of(model, (optimizer,), save_frozen=True)


def test_what_watches_optimizers_sees_new_tensors_and_not_new_values() -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    empty = WatchedOptimizers((optimizer,))
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not empty.unchanged()

    watched = WatchedOptimizers((optimizer,))
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert watched.unchanged()
    optimizer.state[model.bias]["exp_avg"] = optimizer.state[model.bias]["exp_avg"].clone()
    assert not watched.unchanged()

    watched = WatchedOptimizers((optimizer,))
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)  # adds "initial_lr" to each group
    assert not watched.unchanged()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    watched = WatchedOptimizers((optimizer,))
    optimizer.param_groups[1]["params"].append(nn.Parameter(torch.zeros(1)))
    assert not watched.unchanged()


def test_nested_state_is_watched_too() -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.bias] = {"inner": {"m": torch.zeros(4)}, "history": [torch.zeros(4)], "count": 1}
    watched = WatchedOptimizers((optimizer,))
    optimizer.state[model.bias]["count"] = 2
    assert watched.unchanged()
    assert objects_now(model, (optimizer,))["optimizer.state.bias.count"] == 2
    optimizer.state[model.bias]["inner"]["m"] = torch.ones(4)
    assert not watched.unchanged()
    watched = WatchedOptimizers((optimizer,))
    optimizer.state[model.bias]["history"].append(torch.ones(4))
    assert not watched.unchanged()


class Strange(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"scale": 1}


def test_what_could_not_be_put_back_is_refused_by_name() -> None:
    model = nn.Linear(3, 4)
    model.register_buffer("wide", torch.zeros(1).expand(5))
    with pytest.raises(UnsupportedModel, match=r"model\.wide is an expanded tensor"):
        tree_of(model, (), save_frozen=True)
    with pytest.raises(UnsupportedModel, match=r"0\._extra_state: a module's get_extra_state"):
        tree_of(nn.Sequential(Strange()), (), save_frozen=True)
    model = nn.Linear(3, 4)
    both = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.AdamW(model.parameters())]
    with pytest.raises(UnsupportedModel, match=r"several optimizers .* have weight, bias; each parameter needs one"):
        tree_of(model, both, save_frozen=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.5))
    optimizer.param_groups[0]["where"] = Path("x")
    with pytest.raises(OptionError, match=r"optimizer\.param_groups\.0\.where of the optimizer holds more than"):
        objects_now(model, (optimizer,))
    del optimizer.param_groups[0]["where"]
    assert type(objects_now(model, (optimizer,))["optimizer.param_groups.0.lr"]) is float
