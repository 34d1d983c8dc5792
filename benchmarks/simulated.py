"""Models of real size on meshes of any size, as one rank of them sees them: no processes, no weights, no memory.

torch's fake process group plays the rank. Every local tensor is one element, expanded to the shape that the rank would
hold, so all that reads shapes, placements and addresses works as in a real job. The placements are those of
`fully_shard`, which itself takes minutes for 16,384 ranks, as it cuts every tensor into as many; at a size where it is
fast enough, `refuse_another_distribution` compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from stillframe.testing.playing import playing

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


def by_rows(shape: torch.Size, ep: int, efsdp: int) -> bool:
    return shape[0] // ep < efsdp


def _fsdp_and_experts(world_size: int) -> Placing:
    """Experts over ep, then over the rest of the ranks; by rows where those outnumber the experts of a rank."""
    ep = expert_parallel_size(world_size)
    mesh = init_device_mesh("cpu", (world_size // ep, ep), mesh_dim_names=("efsdp", "ep"))
    dense = mesh._flatten("dense")

    def place(name: str, shape: torch.Size) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        if ".mlp.experts." not in name:
            return dense, (Shard(0),)
        if by_rows(shape, ep, mesh.size(0)):
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


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def distribute(model: PreTrainedModel, place: Placing) -> None:
    """Replace every parameter by this rank's part of it."""
    for module, name, path, parameter in _parameters(model):
        mesh, placements = place(path, parameter.shape)
        shape, _ = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        local = torch.zeros((), dtype=parameter.dtype).expand(shape)
        part = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        module.register_parameter(name, nn.Parameter(part))


def _parameters(model: PreTrainedModel) -> list[tuple[nn.Module, str, str, nn.Parameter]]:
    """(module, name in it, name in the model, parameter), none of them shared between modules."""
    return [
        (module, name, f"{prefix}.{name}", parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]


def bytes_of_ranks(model: PreTrainedModel, place: Placing, world_size: int) -> npt.NDArray[np.float64]:
    """The bytes of weights that each rank writes, replicas sharing what they hold alike: by the sizes of all shards."""
    known: dict[object, npt.NDArray[np.float64]] = {}
    total = np.zeros(world_size)
    for _, _, path, parameter in _parameters(model):
        mesh, placements = place(path, parameter.shape)
        key = (id(mesh), placements, parameter.shape)
        if key not in known:
            known[key] = _elements_of_ranks(parameter.shape, mesh, placements)
        total += known[key] * parameter.dtype.itemsize
    return total


def _elements_of_ranks(
    shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> npt.NDArray[np.float64]:
    ranks = mesh.mesh.numpy()
    sizes = [np.full(ranks.shape, size) for size in shape]
    replicas = 1
    for coordinate, placement, parts in zip(np.indices(ranks.shape), placements, ranks.shape, strict=True):
        if isinstance(placement, Replicate):
            replicas *= parts
            continue
        assert isinstance(placement, (Shard, _StridedShard))
        size = sizes[placement.dim]
        blocks = placement.split_factor if isinstance(placement, _StridedShard) else 1
        assert (size % blocks == 0).all(), "no other blocks are simulated"
        step = -(-(size // blocks) // parts)
        sizes[placement.dim] = blocks * np.clip(size // blocks - coordinate * step, 0, step)
    elements = np.empty(ranks.size)
    elements[ranks] = math.prod(sizes) / replicas
    return elements


def refuse_another_distribution(config: PreTrainedConfig, distribution: str, world_size: int) -> None:
    """Raise AssertionError unless `distribute` does what `fully_shard` does to a model of few layers."""
    config = type(config)(**config.to_dict() | {"num_hidden_layers": 4})
    for rank in (0, world_size - 1):
        with playing(rank, world_size):
            simulated, real = on_meta(config), on_meta(config)
            distribute(simulated, DISTRIBUTIONS[distribution](world_size))
            _fully_shard(real, distribution, world_size)
            for (_, _, path, mine), (_, _, other_path, other) in zip(
                _parameters(simulated), _parameters(real), strict=True
            ):
                said, expected = (
                    (name, t.placements, t.device_mesh.mesh.tolist(), t.shape, t._local_tensor.shape, t.dtype)
                    for name, t in ((path, mine), (other_path, other))
                    if isinstance(t, DTensor)
                )
                assert said == expected, f"simulated as {said}, but fully_shard makes {expected}"


def _fully_shard(model: PreTrainedModel, distribution: str, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    if distribution == "HSDP":
        mesh = init_device_mesh("cpu", (world_size // 64, 64), mesh_dim_names=("replicate", "shard"))
    if distribution == "FSDP x EP":
        ep = expert_parallel_size(world_size)
        both = init_device_mesh("cpu", (world_size // ep, ep), mesh_dim_names=("efsdp", "ep"))
        mesh = both._flatten("dense")
    for layer in model.model.layers:
        if distribution == "FSDP x EP" and hasattr(layer.mlp, "experts"):
            experts = layer.mlp.experts
            for name, parameter in list(experts.named_parameters()):
                split = distribute_tensor(parameter.data, both["ep"], [Shard(0)], src_data_rank=None)
                experts.register_parameter(name, nn.Parameter(split))
            rows = by_rows(parameter.shape, ep, world_size // ep)
            fully_shard(experts, mesh=both["efsdp"], shard_placement_fn=(lambda _: Shard(1)) if rows else None)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
