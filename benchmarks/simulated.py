"""Models of real size on meshes of any size, as one rank of them sees them: no processes, no weights, no memory.

torch's fake process group plays the rank. Every local tensor is one element, expanded to the shape that the rank would
hold, so all that reads shapes, placements and addresses works as in a real job. The placements are those that
`fully_shard` gives (`check_against_fully_shard` compares them at a size where it is fast enough: with 16,384 ranks it
takes minutes, as it cuts every tensor into as many).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

BF16 = {"dtype": torch.bfloat16, "tie_word_embeddings": False}


def _qwen3(**sizes: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(vocab_size=151936, num_experts=128, num_key_value_heads=4, head_dim=128, **sizes, **BF16)


MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen3-30B-A3B": lambda: _qwen3(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
    ),
    "Qwen3-235B-A22B": lambda: _qwen3(
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
    ),
    "DeepSeek-V3": lambda: DeepseekV3Config(**BF16),  # its defaults are that model
    "Kimi-K2": lambda: DeepseekV3Config(
        vocab_size=163840,
        n_routed_experts=384,
        num_attention_heads=64,
        num_key_value_heads=64,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        **BF16,
    ),
}

Placing = Callable[[str, torch.Size], tuple[DeviceMesh, tuple[Placement, ...]]]


def _fsdp(world_size: int) -> Placing:
    """`fully_shard` as it is: every parameter cut along its first dimension, over all ranks."""
    mesh = init_device_mesh("cpu", (world_size,))
    return lambda name, shape: (mesh, (Shard(0),))


def expert_parallel_size(world_size: int) -> int:
    return 8 if world_size < 1024 else 64


def _fsdp_and_experts(world_size: int) -> Placing:
    """Experts over ep, then over the rest of the ranks; by rows where those outnumber the experts of a rank."""
    ep = expert_parallel_size(world_size)
    mesh = init_device_mesh("cpu", (world_size // ep, ep), mesh_dim_names=("efsdp", "ep"))
    dense = mesh._flatten("dense")

    def place(name: str, shape: torch.Size) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        if ".mlp.experts." not in name:
            return dense, (Shard(0),)
        if shape[0] // ep < mesh.size(0):
            return mesh, (Shard(1), Shard(0))
        return mesh, (_StridedShard(0, split_factor=ep), Shard(0))

    return place


def _hsdp(world_size: int) -> Placing:
    """Groups of 64 ranks that hold the whole model, each with `fully_shard`."""
    mesh = init_device_mesh("cpu", (world_size // 64, 64), mesh_dim_names=("replicate", "shard"))
    return lambda name, shape: (mesh, (Replicate(), Shard(0)))


DISTRIBUTIONS: dict[str, Callable[[int], Placing]] = {
    "FSDP": _fsdp,
    "FSDP x EP": _fsdp_and_experts,
    "HSDP": _hsdp,
}


@contextmanager
def playing(rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def distribute(model: PreTrainedModel, place: Placing) -> None:
    """Replace every parameter by this rank's part of it."""
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            mesh, placements = place(f"{prefix}.{name}", parameter.shape)
            shape, _ = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
            local = torch.zeros((), dtype=parameter.dtype).expand(shape)
            part = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
            module.register_parameter(name, nn.Parameter(part))
