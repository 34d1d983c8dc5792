"""The ranks of a run, and how a model is split over them: FSDP2, or nothing in a process of its own."""

from __future__ import annotations

import contextlib
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from stillframe.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place among those that train: without `is_distributed`, rank 0 of 1 and no process group."""

    rank: int
    world_size: int
    device: torch.device
    is_distributed: bool

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, as float64. Collective; on CUDA too it goes over the CPU (gloo), so that
        the device's queue is not waited for."""
        if not self.is_distributed:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()


def start_ranks(device: str) -> Ranks:
    """Join the ranks that the launcher started (`torchrun` sets RANK, WORLD_SIZE, LOCAL_RANK), else be alone.

    A default process group that exists already is used as it is.
    `device` is "cpu", "cuda", or "auto": CUDA where there is one. Collective under a launcher.
    Raises `OptionError` if there are more ranks on this host than CUDA devices, or none.
    """
    kind = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind == "cuda" and torch.cuda.device_count() < local_world_size:
        raise OptionError(
            f"training.device: {local_world_size} ranks on this host, but {torch.cuda.device_count()} CUDA devices; "
            "start fewer ranks, or set training.device = 'cpu'"
        )
    place = torch.device("cpu") if kind == "cpu" else torch.device("cuda", local_rank)
    if kind == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ:
            return Ranks(rank=0, world_size=1, device=place, is_distributed=False)
        if kind == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place)
        else:
            dist.init_process_group("gloo")
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=place, is_distributed=True)


def shard(model: PreTrainedModel, ranks: Ranks, compute_dtype: torch.dtype) -> None:
    """Split `model` in place over all ranks with FSDP2, one group per block and one for the rest.

    Parameters keep their dtype; all-gathers and computation are in `compute_dtype`, gradients are reduced in float32.
    Parameters on the meta device stay there. Does nothing in a process that is alone.
    """
    if not ranks.is_distributed:
        return
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("fsdp",))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in outermost_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def outermost_blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers, and in a composed model the vision blocks: what Transformers checkpoints activations of."""
    found: list[torch.nn.Module] = []
    for child in module.children():
        found += [child] if isinstance(child, GradientCheckpointingLayer) else outermost_blocks(child)
    return found


def autocast(ranks: Ranks, compute_dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """What a process that is alone computes under, where no `MixedPrecisionPolicy` casts for it."""
    if ranks.is_distributed or compute_dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(ranks.device.type, dtype=compute_dtype)


def set_gradient_sync(model: torch.nn.Module, *, last_micro_step: bool) -> None:
    """Reduce gradients over the ranks in the backward of the last micro-batch only; the others accumulate locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last_micro_step)


def seed_own_numbers(ranks: Ranks, *, seed: int, step: int) -> None:
    """Start this rank's random numbers (torch on every device, NumPy, Python) for what follows `step`: dropout, hooks.

    A function of seed, step and rank, so that no two ranks drop the same units, and none repeats what it drew before.
    """
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence((seed, step, ranks.rank)).generate_state(3, np.uint64)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed) % 2**32)
    random.seed(int(python_seed))
