"""The schedule's values, and what decays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stillframe.train.config import OptimizerConfig
from stillframe.train.optim import build_optimizer, clip_gradients, learning_rate


def test_warm_up_is_linear_and_reaches_the_rate() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.0)
    assert [learning_rate(step, 100, config) for step in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_falls_from_the_rate_to_the_least() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(10, 110, config) == 2.0
    assert learning_rate(60, 110, config) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert learning_rate(35, 110, config) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert learning_rate(110, 110, config) == pytest.approx(0.2)
    rates = [learning_rate(step, 110, config) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_no_warm_up_and_nothing_but_warm_up() -> None:
    assert learning_rate(1, 1, OptimizerConfig(lr=1.0, min_lr_ratio=0.5)) == pytest.approx(0.5)
    assert learning_rate(3, 3, OptimizerConfig(lr=1.0, warmup_steps=3)) == 1.0


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))
        self.down_proj_bias = nn.Parameter(torch.zeros(2, 4))
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


def test_norms_biases_and_frozen_parameters_do_not_decay() -> None:
    module = Experts()
    optimizer = build_optimizer(module, OptimizerConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {
        "linear.weight": 0.3,
        "down_proj": 0.3,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "linear.bias": 0.0,
        "down_proj_bias": 0.0,
    }


def test_clipping_scales_all_gradients_together() -> None:
    module = nn.Linear(2, 1)
    module.weight.grad = torch.tensor([[3.0, 0.0]])
    module.bias.grad = torch.tensor([4.0])
    assert clip_gradients(module, 2.5).item() == 5.0
    torch.testing.assert_close(module.weight.grad, torch.tensor([[1.5, 0.0]]))
    torch.testing.assert_close(module.bias.grad, torch.tensor([2.0]))
    assert clip_gradients(module, math.inf).item() == pytest.approx(2.5)
