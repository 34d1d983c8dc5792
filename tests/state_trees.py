"""The state of a model and its optimizer as a tree, from what torch itself calls their state dicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from stillframe.tree import StateTree


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An AdamW of `model` after one step, with gradients that differ from element to element."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = parameter.detach() * 0.5 + 0.125
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def tree_of(model: nn.Module, optimizer: torch.optim.Optimizer | None, *, frozen: bool = True) -> StateTree:
    """The tree, with the live parameters and buffers; `frozen` False leaves out those that require no gradient."""
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    flat, paths = flatten_state_dict(state)
    parameters = {_plain(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    buffers = {_plain(n): b for n, b in model.named_buffers(remove_duplicate=False)}
    live = {f"model.{name}": tensor for name, tensor in {**parameters, **buffers}.items()}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    objects: dict[str, object] = {}
    seen: dict[int, str] = {}
    for key, value in flat.items():
        if not isinstance(value, torch.Tensor):
            objects[key] = value
            continue
        tensor = live.get(key, value)
        if not frozen and key in live and not tensor.requires_grad:
            continue
        first = seen.setdefault(id(tensor), key)
        if first == key:
            tensors[key] = tensor
        else:
            aliases[key] = first
    kept = tensors.keys() | aliases.keys() | objects.keys()
    return StateTree(
        tensors=tensors,
        aliases=aliases,
        rank_0_only=frozenset(f"model.{name}" for name in buffers if f"model.{name}" in tensors),
        objects=objects,
        paths={key: path for key, path in paths.items() if key in kept},
    )


def _plain(name: str) -> str:
    return name.removeprefix("module.")  # of DistributedDataParallel
