"""layout="hub" on several ranks: the default save with its experts transposed, whoever holds which part of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

import stillframe
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_qwen3_vl_moe
from tests.multirank.exports import distribute


def _expert_parallel(world_size: int) -> Any:
    model = tiny_qwen3_vl_moe()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    for layer in model.model.language_model.layers:
        for name, parameter in list(layer.mlp.experts.named_parameters()):
            setattr(layer.mlp.experts, name, type(parameter)(distribute_tensor(parameter.data, mesh, [Shard(0)])))
    return model


def _fsdp_and_expert_parallel(world_size: int) -> Any:
    model = tiny_qwen3_vl_moe()
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("efsdp", "ep"))
    for layer in model.model.language_model.layers:
        experts = layer.mlp.experts
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, type(parameter)(distribute_tensor(parameter.data, mesh["ep"], [Shard(0)])))
        fully_shard(experts, mesh=mesh["efsdp"])
    fully_shard(model, mesh=mesh._flatten("dense"))
    return model


def _cut_matrices(world_size: int) -> Any:
    """The experts' matrices are cut, as in tensor parallelism: their elements are copied one by one."""
    model = tiny_qwen3_vl_moe()
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.model.language_model.layers:
        for name, parameter in list(layer.mlp.experts.named_parameters()):
            placed = distribute_tensor(parameter.data, mesh, [Shard(1 if name.startswith("gate") else 2)])
            setattr(layer.mlp.experts, name, type(parameter)(placed))
    return model


WAYS: dict[str, tuple[int, Callable[[int], Any]]] = {
    "fsdp 3": (3, lambda _: distribute(tiny_qwen3_vl_moe(), "fsdp")),
    "replicas 2": (2, lambda _: distribute(tiny_qwen3_vl_moe(), "ddp")),
    "ep 2": (2, _expert_parallel),
    "fsdp ep 4": (4, _fsdp_and_expert_parallel),
    "cut 2": (2, _cut_matrices),
}
OPTIONS: dict[str, dict[str, Any]] = {"as it is": {}, "cast": {"save_dtype": "bfloat16"}}


def export_and_load(base_dir: Path, way: str) -> None:
    world_size, make = WAYS[way]
    model = make(world_size)
    for name, options in OPTIONS.items():
        with stillframe.Checkpointer(base_dir / name, model=model, layout="hub", **options) as ckpt:
            ckpt.save_hf(7) if options else ckpt.save_both(7)
    expected = {key: _local(value).clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    stillframe.load_hf(base_dir / "as it is" / "hf-7", model)
    assert all(torch.equal(_local(value), expected[key]) for key, value in model.state_dict().items())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def transposed() -> dict[str, dict[str, torch.Tensor]]:
    """What the default save has, its experts turned round."""

    def turned(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        state = model.state_dict()
        return {key: tensor.transpose(1, 2) if ".mlp.experts." in key else tensor for key, tensor in state.items()}

    return {"as it is": turned(tiny_qwen3_vl_moe()), "cast": turned(tiny_qwen3_vl_moe().bfloat16())}


@pytest.mark.parametrize("way", WAYS)
def test_experts_are_transposed_wherever_they_are(
    way: str, transposed: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run_ranks(WAYS[way][0], export_and_load, tmp_path, way)
    for name in OPTIONS:
        found = load_file(tmp_path / name / "hf-7" / "model.safetensors")
        assert found.keys() == transposed[name].keys()
        for key, tensor in transposed[name].items():
            assert torch.equal(found[key], tensor), (name, key)
