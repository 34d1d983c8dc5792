"""AdamW and its learning rate, a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from stillframe.train.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients; matrices decay, norms and biases do not.

    Biases are known by name as well as by dimension: those of fused experts are matrices, `[experts, features]`.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [p for name, p in trained if p.ndim >= 2 and "bias" not in name.rpartition(".")[2]]
    decayed_ids = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for _, p in trained if id(p) not in decayed_ids], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The rate of `step` (from 1): `lr * step / warmup_steps` while warming up, which reaches `lr` at the last of them,
    then a cosine that reaches `lr * min_lr_ratio` at `total_steps`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients together so that their global 2-norm is at most `max_norm`.

    Returns the norm before, a 0-d tensor on the model's device. Collective where gradients are DTensors, without
    waiting for the device.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm
