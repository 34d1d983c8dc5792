"""Byte identity under parallelism beyond FSDP: replicas, tensor and expert parallelism, alone and with FSDP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import stillframe
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe
from tests.multirank.exports import build, digests, reference

SIZES = ("50KB", "50GB")
LINEARS = {
    **{f"self_attn.{name}_proj": ColwiseParallel for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def _hsdp() -> PreTrainedModel:
    model = tiny_qwen3_moe()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _fsdp_and_tensor_parallel() -> PreTrainedModel:
    """Norms are on the fsdp part of the mesh only, so each is held twice."""
    model = tiny_qwen3()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], {name: style() for name, style in LINEARS.items()})
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    return model


def _expert_parallel_by_hand() -> PreTrainedModel:
    """Experts split over ep, then sharded over fsdp; everything else over all four ranks."""
    model = tiny_qwen3_moe()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    dense = mesh._flatten("dense")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name, parameter in list(experts.named_parameters()):
            split = distribute_tensor(parameter.data, mesh["ep"], [Shard(0)])
            setattr(experts, name, type(parameter)(split))
        fully_shard(experts, mesh=mesh["efsdp"])
        fully_shard(layer, mesh=dense)
    fully_shard(model, mesh=dense)
    return model


BY_HAND: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "hsdp": ("qwen3_moe", _hsdp),
    "fsdp_tp": ("qwen3", _fsdp_and_tensor_parallel),
    "fsdp_ep": ("qwen3_moe", _expert_parallel_by_hand),
}
NATIVE: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp_size": 2}),
    "fsdp4_ep2": (4, {"fsdp_size": 4, "ep_size": 2}),
    "fsdp4_ep4": (4, {"fsdp_size": 4, "ep_size": 4}),
    "fsdp2_tp2": (4, {"fsdp_size": 2, "tp_size": 2}),
    "fsdp2_tp2_ep4": (4, {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}),
}


def _save(run_dir: Path, model: PreTrainedModel) -> list[int]:
    staged = []
    for size in SIZES:
        with stillframe.Checkpointer(run_dir / size, model=model, max_shard_size=size) as ckpt:
            ckpt.save_hf(7)
            staged.append(ckpt.reports[-1].staged_bytes)
    return staged


def _save_by_hand(run_dir: Path, how: str) -> list[int]:
    return _save(run_dir, BY_HAND[how][1]())


def _save_native(run_dir: Path, source_dir: Path, sizes: dict[str, Any]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(source_dir, distributed_config=DistributedConfig(**sizes))
    return _save(run_dir, model)


def _assert_identical(run_dir: Path, name: str, source_dir: Path | None, reference_dir: Path) -> None:
    for size in SIZES:
        reference(reference_dir / size, name, source_dir, size)
        expected = {n: d for n, d in digests(reference_dir / size).items() if "token" not in n and "chat" not in n}
        saved = digests(run_dir / size / "hf-7")
        assert saved.pop("stillframe.json")
        assert saved == expected


@pytest.mark.parametrize("how", BY_HAND)
def test_export_by_hand_equals_save_pretrained(how: str, tmp_path: Path) -> None:
    staged = run_ranks(4, _save_by_hand, tmp_path / "run", how)
    _assert_identical(tmp_path / "run", BY_HAND[how][0], None, tmp_path / "reference")
    total = sum(path.stat().st_size for path in (tmp_path / "run" / "50GB" / "hf-7").glob("*.safetensors"))
    assert sum(rank[1] for rank in staged) == total


@pytest.mark.parametrize("how", NATIVE)
def test_export_of_natively_distributed_models_equals_save_pretrained(how: str, tmp_path: Path) -> None:
    world_size, sizes = NATIVE[how]
    source_dir = tmp_path / "source"
    build("qwen3_moe", None).save_pretrained(source_dir)
    run_ranks(world_size, _save_native, tmp_path / "run", source_dir, sizes)
    _assert_identical(tmp_path / "run", "qwen3_moe", source_dir, tmp_path / "reference")
