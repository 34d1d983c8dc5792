"""Exports in fp8 have the bits of quantizing the whole model in one place, however it is distributed; loading them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

import stillframe
from stillframe.errors import SaveFailed, StillframeError
from stillframe.snapshot.peers import Peers
from stillframe.testing import run_process, run_ranks
from tests.multirank.fp8 import (
    FP8,
    SCALES,
    assert_same_bits,
    dequantized,
    expected,
    model_of_whole_blocks,
    moe_with_partial_blocks,
    saved,
)
from tests.multirank.test_load import local_of
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


def _write_whole(directory: Path) -> dict[str, torch.Tensor]:
    """An export in fp8 as a few lines of torch write it; returns the model's tensors as it should be loaded."""
    model = moe_with_partial_blocks(seed=1)
    model.save_pretrained(directory)
    whole = saved(directory)
    tensors = expected(whole, {key for key in whole if IN_FP8.search(key)})
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def _load(directory: Path, how: str, dtype: torch.dtype) -> tuple[int, int, dict[str, torch.Tensor]]:
    model = DISTRIBUTED[how][1](moe_with_partial_blocks(seed=2, dtype=dtype))
    report = stillframe.load_hf(directory, model)
    elements = sum(local_of(parameter).numel() for parameter in model.parameters())
    found = {name.removeprefix("module."): tensor for name, tensor in model.state_dict().items()}
    return report.bytes_read, elements, {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}


@pytest.mark.parametrize("how", ["alone", "fsdp 3", "by columns", "fsdp ep"])
def test_it_is_loaded_into_any_mesh(how: str, tmp_path: Path) -> None:
    stored = _write_whole(tmp_path)
    dtype = torch.bfloat16 if how == "fsdp 3" else torch.float32
    plain = {
        key: dequantized(tensor, stored[key + SCALES], dtype) if key + SCALES in stored else tensor.to(dtype)
        for key, tensor in stored.items()
        if not key.endswith(SCALES)
    }
    whole = moe_with_partial_blocks(dtype=dtype)
    whole.load_state_dict(_fused(plain))
    scales_bytes = sum(tensor.nbytes for key, tensor in stored.items() if key.endswith(SCALES))
    for bytes_read, elements, found in run_ranks(DISTRIBUTED[how][0], _load, tmp_path, how, dtype):
        assert_same_bits(found, whole.state_dict())
        # Of what it holds a byte each, and another of what is in bfloat16 (embeddings, norms); and scales.
        in_bfloat16 = sum(t.numel() for t in stored.values() if t.dtype == torch.bfloat16)
        assert elements < bytes_read <= elements + in_bfloat16 + scales_bytes


def _fused(keys: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as the model has them."""
    found = {key: tensor for key, tensor in keys.items() if ".experts." not in key}
    prefix = "model.layers.1.mlp.experts."
    gate, up, down = (
        torch.stack([keys[f"{prefix}{e}.{name}_proj.weight"] for e in range(4)]) for name in ("gate", "up", "down")
    )
    return {**found, f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}


def _fail_early(run_dir: Path) -> str:
    """A rank whose snapshot fails before it comes to the others, which wait for it."""
    model = _fsdp(moe_with_partial_blocks())
    with stillframe.Checkpointer(run_dir, model=model, save_dtype="fp8") as ckpt:
        metrics = {"loss": "high"} if dist.get_rank() == 0 else {"loss": 1.0}
        with pytest.raises(SaveFailed) as failed:
            ckpt.save_hf(1, metrics=metrics)
        ckpt.save_hf(2)
    return str(failed.value)


def test_a_rank_that_fails_before_the_exchange_keeps_nobody_waiting(tmp_path: Path) -> None:
    first, second = run_ranks(2, _fail_early, tmp_path)
    assert "metrics: 'loss' must be a number" in first
    assert "rank 0 failed in its snapshot" in second or "metrics" in second
    assert not (tmp_path / "hf-1").exists()
    assert (tmp_path / "hf-2").is_dir()


def _exchange() -> list[str]:
    """Two exchanges of both ranks, with and without what they may share; then rank 1 does not come any more."""
    rank = dist.get_rank()
    exchange = Peers(3.0)
    table = torch.tensor([rank, 5 - rank, torch.nan if rank else 1.0]).view(torch.int32)
    exchange.largest(table)
    assert table.view(torch.float32)[:2].tolist() == [1.0, 5.0]
    assert table.view(torch.float32)[2].isnan()
    messages = []
    with pytest.raises(StillframeError) as differ:
        exchange.largest(table[: 2 + rank])
    messages.append(str(differ.value))
    for _ in range(2) if rank == 0 else ():
        with pytest.raises(StillframeError) as late:
            exchange.largest(table)
        messages.append(str(late.value))
    dist.barrier()
    exchange.close()
    return messages


def test_every_wait_of_an_exchange_is_bounded() -> None:
    (differ, late, broken), (same,) = run_ranks(2, _exchange)
    assert differ == same == "ranks share between 2 and 3 blocks of fp8: their models differ"
    assert "did every rank call the save?" in late
    assert "failed before" in broken


def _save_whole_blocks(run_dir: Path) -> None:
    model = _fsdp(model_of_whole_blocks())
    with stillframe.Checkpointer(run_dir, model=model, save_dtype="fp8", keep_in_bf16="layers.1.mlp") as ckpt:
        ckpt.save_hf(1)


def _from_pretrained(directory: Path, result_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()
    save_file(model.state_dict(), result_path)


def test_transformers_loads_it_in_a_process_of_its_own(tmp_path: Path) -> None:
    run_ranks(3, _save_whole_blocks, tmp_path)
    path = tmp_path / "hf-1"
    left_alone = ["lm_head", *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")), "model.embed_tokens"]
    config = json.loads((path / "config.json").read_text())
    assert sorted(config["quantization_config"].pop("modules_to_not_convert")) == sorted(left_alone)
    assert (config["dtype"], config["quantization_config"]) == (
        "bfloat16",
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    )
    run_process(_from_pretrained, path, tmp_path / "found.safetensors")
    found = load_file(tmp_path / "found.safetensors")
    stored = saved(path)
    assert sum(tensor.dtype == FP8 for tensor in stored.values()) == 2 * 7 - 3
    plain = {
        key: dequantized(tensor, stored[key + SCALES], torch.bfloat16) if key + SCALES in stored else tensor
        for key, tensor in stored.items()
        if not key.endswith(SCALES)
    }
    assert_same_bits(found, plain)
    ours = model_of_whole_blocks(seed=3).to(torch.bfloat16)
    stillframe.load_hf(path, ours)
    assert_same_bits(ours.state_dict(), found)
    before = model_of_whole_blocks().state_dict()
    for key, tensor in found.items():
        error = (tensor.float() - before[key]).norm() / before[key].norm()
        assert 0 < error < 0.04, key
