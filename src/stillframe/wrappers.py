"""Modules that `torch.compile` and activation checkpointing put around others, and the names without them.

They change what a module is called (`layers.0._orig_mod.weight`), not what it is: what is saved has the names of the
model without them, and is loaded into a model with other ones, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from stillframe.errors import UnsupportedModel

# What wrappers call the one module that they hold: torch's `_dynamo.eval_frame.OptimizedModule`, and
# `distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper`.
_WRAPPED_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """A name in the model without the parts that `torch.compile` and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED_NAMES)


def unwrapped_module(model: nn.Module) -> nn.Module:
    """The module inside of DDP, `torch.compile` and activation checkpointing, whichever are outermost.

    Raises UnsupportedModel for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"{type(model).__name__} is not a torch.nn.Module, so there is no model to save or load")
    inner: Any = model
    while (held := inner.module if isinstance(inner, DistributedDataParallel) else _held(inner)) is not None:
        inner = held
    module: nn.Module = inner
    return module


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Take the wrappers inside of `model` away while the context lasts: its modules have the names they had before.

    For what goes by the names of modules, as Transformers' conversions do (`named_modules`, `get_parameter`); nothing
    may run the model meanwhile. Where only names of tensors are wanted, `clean_name` will do.
    """
    replaced = []
    try:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                inner = child
                while inner is not None and (held := _held(inner)) is not None:
                    inner = held
                if inner is not child:
                    replaced.append((parent._modules, name, child))
                    parent._modules[name] = inner
        yield
    finally:
        for modules, name, child in replaced:
            modules[name] = child


@contextmanager
def unsharded_classes(model: nn.Module) -> Iterator[None]:
    """Give modules the classes they had before `fully_shard`, which renames them (`FSDPLlamaModel`).

    Transformers looks conversions up by class name, and the reference is the save of the unsharded model.
    """
    sharded = [(m, type(m)) for m in model.modules() if isinstance(m, FSDPModule)]
    try:
        for module, cls in sharded:
            module.__class__ = cls.__mro__[2]  # (FSDPX, FSDPModule, X, ...): see torch's fully_shard
        yield
    finally:
        for module, cls in sharded:
            module.__class__ = cls


def _held(module: nn.Module) -> nn.Module | None:
    """The module that `module` is a wrapper of; None if it is none, or has something of its own besides."""
    if len(module._modules) != 1 or module._parameters or module._buffers:
        return None
    ((name, inner),) = module._modules.items()
    return inner if name in _WRAPPED_NAMES else None
