"""Exports of tensors that are cut across their rows: the ranks exchange rows, and the bytes are still the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import stillframe
from stillframe.cli.inspecting import format_inspected, inspect
from stillframe.layout import reshuffle
from stillframe.manifest import read_manifest
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe
from tests.multirank.exports import digests

SMALL_BUCKET_BYTES = {"tp2": 2048, "tp3": 2048, "fsdp2_tp2": 2048, "ep2_tp2": 12288}  # of experts, a row is a matrix


def _shard(module: nn.Module, mesh: DeviceMesh, dims: dict[str, int]) -> None:
    """Shard each parameter whose name contains a key of `dims` along that dimension; tied ones stay tied."""
    split: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        for dim in (dim for part, dim in dims.items() if part in name):
            split[id(parameter)] = nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(dim)]))
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) in split:
                setattr(owner, name, split[id(parameter)])


DIMS = {"o_proj": 1, "down_proj": 1, "gate_proj": 0, "up_proj": 0, "embed_tokens": 1}


def _tensor_parallel() -> PreTrainedModel:
    """Over three ranks nothing divides evenly."""
    model = tiny_qwen3()
    _shard(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), DIMS)
    return model


def _fsdp_and_tensor_parallel() -> PreTrainedModel:
    model = tiny_qwen3()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    _shard(model, mesh["tp"], DIMS)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    return model


def _experts_and_tensor_parallel() -> PreTrainedModel:
    """Experts split among pairs of ranks, and cut inside of their matrices; everything else is held by two ranks."""
    model = tiny_qwen3_moe()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name, dim in (("gate_up_proj", 1), ("down_proj", 2)):
            split = distribute_tensor(getattr(experts, name).data, mesh, [Shard(0), Shard(dim)])
            setattr(experts, name, nn.Parameter(split))
        _shard(layer.self_attn, mesh["tp"], {"o_proj": 1})
    return model


WAYS: dict[str, tuple[int, Callable[[], PreTrainedModel], Callable[[], PreTrainedModel]]] = {
    "tp2": (2, tiny_qwen3, _tensor_parallel),
    "tp3": (3, tiny_qwen3, _tensor_parallel),
    "fsdp2_tp2": (4, tiny_qwen3, _fsdp_and_tensor_parallel),
    "ep2_tp2": (4, tiny_qwen3_moe, _experts_and_tensor_parallel),
}


class _Live(TorchDispatchMode):
    """The largest block of new memory that an operation asks for, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.made_bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func) or "clone" in str(func) or "cat" in str(func) or "_to_copy" in str(func):
            self.made_bytes.append(result.nbytes)
        return result


def _changed(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter._local_tensor if isinstance(parameter, DTensor) else parameter).mul_(2)


def _save(run_dir: Path, way: str, bucket_bytes: int, direct_from_bytes: int) -> tuple[list[int], list[int]]:
    reshuffle.BUCKET_BYTES, reshuffle.DIRECT_FROM_BYTES = bucket_bytes, direct_from_bytes
    model = WAYS[way][2]()
    with stillframe.Checkpointer(run_dir / "as-it-is", model=model) as ckpt:
        ckpt.save_hf(1)
        frames = ckpt._frames
        assert frames is not None
        extents = [len(file.extents) for plan in frames._write_plans() for file in plan.files]
        _changed(model)
        with _Live() as live:
            ckpt.save_hf(2)
    with stillframe.Checkpointer(run_dir / "cast", model=model, save_dtype="bfloat16", max_shard_size="50KB") as ckpt:
        ckpt.save_hf(2)
    return extents, live.made_bytes


@pytest.mark.parametrize("way", WAYS)
def test_an_export_of_exchanged_tensors_equals_save_pretrained(way: str, tmp_path: Path) -> None:
    world_size, plain, _ = WAYS[way]
    bucket_bytes = SMALL_BUCKET_BYTES[way]
    made = run_ranks(world_size, _save, tmp_path / "run", way, bucket_bytes, 64 << 10)
    model = plain()
    model.save_pretrained(tmp_path / "first")
    _changed(model)
    model.save_pretrained(tmp_path / "second")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "cast", max_shard_size="50KB")
    for name, step, saved in (("first", 1, "as-it-is"), ("second", 2, "as-it-is"), ("cast", 2, "cast")):
        found = digests(tmp_path / "run" / saved / f"hf-{step}")
        assert found.pop("stillframe.json")
        assert found == digests(tmp_path / name)
    done = read_manifest(tmp_path / "run" / "as-it-is" / "hf-1").reshuffled
    assert done is not None
    assert done.tensors >= 2
    assert done.size_bytes > 4 * bucket_bytes
    assert done.bucket_bytes == bucket_bytes
    printed = format_inspected(inspect(tmp_path / "run" / "as-it-is" / "hf-1"), tensors=False)
    assert f"  {done.tensors} tensors, " in printed
    assert "exchanged among ranks to whole rows" in printed
    for _, blocks in made:
        large = [size for size in blocks if size >= bucket_bytes // 2]
        assert len(large) <= 3, "three buffers, once for all tensors"
        assert sum(large) <= 3 * bucket_bytes


def test_long_runs_are_written_where_they_are_and_short_ones_become_few(tmp_path: Path) -> None:
    exchanged = run_ranks(2, _save, tmp_path / "exchanged", "tp2", 2048, 64 << 10)
    direct = run_ranks(2, _save, tmp_path / "direct", "tp2", 2048, 0)
    assert read_manifest(tmp_path / "direct" / "as-it-is" / "hf-1").reshuffled is None
    few, many = (max(sum(extents) for extents, _ in ranks) for ranks in (exchanged, direct))
    assert 10 * few < many
