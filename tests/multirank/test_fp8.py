"""Exports in fp8 have the bits of quantizing the whole model in one place, however it is distributed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import stillframe
from stillframe.testing import run_ranks
from tests.multirank.fp8 import assert_same_bits, expected, moe_with_partial_blocks, saved
from tests.multirank.test_parallelism import LINEARS

IN_FP8 = re.compile(r"\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj)\.weight")


def _fsdp(model: PreTrainedModel) -> torch.nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _by_columns(model: PreTrainedModel) -> torch.nn.Module:
    """FSDP along the last dimension: blocks are cut in columns, and a rank holds a part of each row."""

    def last_dim(parameter: torch.nn.Parameter) -> Shard | None:
        return Shard(parameter.dim() - 1) if parameter.dim() > 1 and parameter.shape[-1] % 3 == 0 else None

    for layer in model.model.layers:
        fully_shard(layer, shard_placement_fn=last_dim)
    return fully_shard(model)


def _hsdp(model: PreTrainedModel) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tensor_parallel(model: PreTrainedModel) -> torch.nn.Module:
    """Attention and dense layers over both ranks, by rows and by columns; experts by columns."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        plan = {
            name: style()
            for name, style in LINEARS.items()
            if name.startswith("self_attn") or layer is model.model.layers[0]
        }
        parallelize_module(layer, mesh, plan)
    experts = model.model.layers[1].mlp.experts
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(2)])))
    return model


def _fsdp_and_tensor_parallel(model: PreTrainedModel) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    for layer in model.model.layers:
        plan = {
            name: style()
            for name, style in LINEARS.items()
            if name.startswith("self_attn") or layer is model.model.layers[0]
        }
        parallelize_module(layer, mesh["tp"], plan)
        fully_shard(layer, mesh=mesh["fsdp"])
    return fully_shard(model, mesh=mesh["fsdp"])


def _expert_parallel(model: PreTrainedModel) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    dense = mesh._flatten("dense")
    for number, layer in enumerate(model.model.layers):
        if number == 1:
            experts = layer.mlp.experts
            for name, parameter in list(experts.named_parameters()):
                setattr(experts, name, torch.nn.Parameter(distribute_tensor(parameter.data, mesh["ep"], [Shard(0)])))
            # Over efsdp by rows of the experts' matrices, not by experts.
            fully_shard(experts, mesh=mesh["efsdp"], shard_placement_fn=lambda _: Shard(1))
        fully_shard(layer, mesh=dense)
    return fully_shard(model, mesh=dense)


DISTRIBUTED: dict[str, tuple[int, Callable[[PreTrainedModel], torch.nn.Module]]] = {
    "alone": (1, _fsdp),
    "fsdp 2": (2, _fsdp),
    "fsdp 3": (3, _fsdp),
    "by columns": (3, _by_columns),
    "ddp": (3, DistributedDataParallel),
    "hsdp": (4, _hsdp),
    "tp": (2, _tensor_parallel),
    "fsdp tp": (4, _fsdp_and_tensor_parallel),
    "fsdp ep": (4, _expert_parallel),
}


def _save(run_dir: Path, how: str) -> None:
    model = DISTRIBUTED[how][1](moe_with_partial_blocks())
    with stillframe.Checkpointer(run_dir, model=model, save_dtype="fp8", max_shard_size="150KB") as ckpt:
        ckpt.save_hf(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        ckpt.save_both(2)


@pytest.mark.parametrize("how", DISTRIBUTED)
def test_the_bits_are_those_of_the_whole_model(how: str, tmp_path: Path) -> None:
    run_ranks(DISTRIBUTED[how][0], _save, tmp_path / "run", how)
    model = moe_with_partial_blocks()
    for step in (1, 2):
        model.save_pretrained(tmp_path / "whole")
        whole = saved(tmp_path / "whole")
        in_fp8 = {key for key in whole if IN_FP8.search(key)}
        assert len(in_fp8) == 2 * 4 + 3 + 4 * 3
        assert_same_bits(saved(tmp_path / "run" / f"hf-{step}"), expected(whole, in_fp8))
        for parameter in model.parameters():
            parameter.data.mul_(3)
