"""The model's own tensors: which names they have, and which models are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stillframe.errors import UnsupportedModel
from stillframe.layout.runtime import runtime_tensors
from stillframe.testing.models import tiny_qwen3


def test_one_of_the_names_of_a_tied_weight_is_kept() -> None:
    names = set(runtime_tensors(tiny_qwen3(tied=True)))
    untied = set(runtime_tensors(tiny_qwen3(tied=False)))
    assert untied - names == {"lm_head.weight"}


def test_a_tie_that_the_model_does_not_declare_is_refused() -> None:
    model = tiny_qwen3()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(
        UnsupportedModel, match=r"layers\.0\.mlp\.up_proj\.weight, .*layers\.1\.mlp\.up_proj\.weight are"
    ):
        runtime_tensors(model)


def test_tensors_that_overlap_in_part_are_refused() -> None:
    model = tiny_qwen3()
    mlp = model.model.layers[0].mlp
    rows, columns = mlp.up_proj.weight.shape
    both = torch.randn(rows + rows // 2, columns)
    mlp.up_proj.weight = nn.Parameter(both[:rows])
    mlp.gate_proj.weight = nn.Parameter(both[rows // 2 :])
    with pytest.raises(UnsupportedModel, match="overlap in memory but are not the same"):
        runtime_tensors(model)


def test_an_entry_of_the_state_that_is_no_tensor_is_refused() -> None:
    class WithState(nn.Identity):
        def get_extra_state(self) -> Any:
            return {"calls": 3}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError("nothing sets it")

    model = tiny_qwen3()
    model.model.layers[0].mlp.extra = WithState()
    with pytest.raises(UnsupportedModel, match=r"mlp\.extra\._extra_state is a dict, not a tensor"):
        runtime_tensors(model)
