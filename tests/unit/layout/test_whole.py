"""The whole model from the class and config of a stage."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from stillframe.errors import UnsupportedModel
from stillframe.layout.whole import tensors_of_whole, whole_model
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_vl_moe


def test_it_has_the_modules_of_all_stages_and_no_data() -> None:
    stage = tiny_qwen3_vl_moe()
    names = stage.state_dict().keys()
    stage.model.visual = None
    stage._weight_conversions = conversions = []  # type: ignore[assignment]  # as from_pretrained leaves them
    before = torch.get_rng_state()
    whole = whole_model(stage)
    assert torch.equal(torch.get_rng_state(), before)
    assert whole.state_dict().keys() == names
    assert {parameter.device.type for parameter in whole.parameters()} == {"meta"}
    assert whole._weight_conversions is conversions
    assert whole.config is not stage.config
    assert tensors_of_whole(whole, names).keys() == names


def test_a_stage_whose_config_is_not_that_of_the_whole_model_is_refused_by_name() -> None:
    stage = tiny_qwen3()
    names = stage.state_dict().keys()
    stage.config.num_hidden_layers = 2
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.2\.\S+ is in a stage .* the config of the whole model"):
        tensors_of_whole(whole_model(stage), names)


class Particular(Qwen3ForCausalLM):
    def __init__(self, config: Qwen3Config, size: int) -> None:
        super().__init__(config)
        self.size = size


def test_a_class_that_wants_more_than_a_config_stands_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    stage = Particular(tiny_qwen3().config, 3)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "stillframe"):
        assert whole_model(stage) is stage
    assert "Particular cannot be made from its config (TypeError" in caplog.text
    module = nn.Linear(2, 2)
    assert whole_model(module) is module
