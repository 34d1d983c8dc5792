"""What the checkpoint tests run on ranks: a tiny model with an optimizer that has a state, saved, changed, resumed.

Gradients are made of the parameters' values, element by element, so that every distribution takes the same steps.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import stillframe
from stillframe.state.tensors import tree_of
from stillframe.tree import StateTree
from tests.multirank.exports import build, distribute
from tests.multirank.test_parallelism import BY_HAND

PLACES: dict[str, tuple[str, Callable[[], Any]]] = {
    "alone": ("qwen3", lambda: build("qwen3", None)),
    "fsdp": ("qwen3", lambda: distribute(build("qwen3", None), "fsdp")),
    "ddp": ("qwen3", lambda: distribute(build("qwen3", None), "ddp")),
    "fsdp moe": ("qwen3_moe", lambda: distribute(build("qwen3_moe", None), "fsdp")),
    "alone vl": ("qwen3_vl_moe", lambda: build("qwen3_vl_moe", None)),
    "fsdp vl": ("qwen3_vl_moe", lambda: distribute(build("qwen3_vl_moe", None), "fsdp")),
    **BY_HAND,
}


class Position:
    """A dataloader that knows how far it is; each rank elsewhere."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Run:
    """A model of a kind (`PLACES`), or what `make` makes, its optimizer and scheduler; `salt` makes its weights unlike
    those of others."""

    def __init__(
        self, how: str, *, salt: float = 0.0, lr: float = 1e-2, make: Callable[[], nn.Module] | None = None
    ) -> None:
        self.model: nn.Module = (make or PLACES[how][1])()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(salt)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.5)
        self.position = Position()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = (parameter.detach() * 3).sin()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.position.at += 1

    def checkpointer(self, run_dir: Path, **options: Any) -> stillframe.Checkpointer:
        return stillframe.Checkpointer(
            run_dir,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            dataloader=self.position,
            save_timeout_s=60,
            **options,
        )

    def tree(self) -> StateTree:
        model = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        return tree_of(model, (self.optimizer,), save_frozen=True)

    def digests(self) -> dict[str, str]:
        """Of every tensor, whole, and of every value: a digest, whatever the distribution. Collective."""
        tree = self.tree()
        found = {key: hashlib.sha256(_bytes(tensor)).hexdigest()[:16] for key, tensor in tree.tensors.items()}
        return {**found, **{key: repr(value) for key, value in tree.objects.items()}}


def draws() -> list[float]:
    """The next numbers of every generator."""
    return [random.random(), float(np.random.rand()), *torch.rand(2).tolist()]


def _bytes(tensor: torch.Tensor) -> bytes:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
