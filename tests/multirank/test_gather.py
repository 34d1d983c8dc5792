"""Keys that a conversion computes, and transposes that shards cut: one rank makes them of what the others hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import stillframe
from stillframe.errors import SaveFailed
from stillframe.layout import gather, tracing
from stillframe.manifest import read_manifest
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_qwen3_vl_moe
from tests.models.tiny_models import tiny_model
from tests.multirank.exports import digests

COMPUTED = r"vision_tower\.encoder\.blocks\.\d\.wqkv\.(weight|bias)"
BUCKET_BYTES = 1024


def _model() -> PreTrainedModel:
    """Kimi-K2.5, whose vision tower has the rows of queries and keys in another order in files."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return tiny_model("kimi_k25", seed=0)


def _fsdp() -> PreTrainedModel:
    model = _model()
    for layer in model.model.vision_tower.layers:
        fully_shard(layer)
    return fully_shard(model)


def _fsdp_and_tensor_parallel() -> PreTrainedModel:
    """Queries are cut along their columns, keys along their rows, and both again by FSDP; biases are whole. The output
    layers, which no conversion computes, are cut along their columns, so that ranks exchange their rows."""
    model = _model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    for layer in model.model.vision_tower.layers:
        for name, dim in (("q_proj", 1), ("k_proj", 0), ("proj", 1)):
            linear = getattr(layer.attn, name)
            linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, mesh["tp"], [Shard(dim)]))
        fully_shard(layer, mesh=mesh["fsdp"])
    return model


WAYS: dict[str, tuple[int, Callable[[], PreTrainedModel]]] = {
    "fsdp": (3, _fsdp),
    "fsdp_tp": (4, _fsdp_and_tensor_parallel),
}


def _doubled(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            getattr(parameter, "_local_tensor", parameter).mul_(2)


def _save(run_dir: Path, way: str) -> int:
    gather.BUCKET_BYTES = BUCKET_BYTES
    model = WAYS[way][1]()
    with stillframe.Checkpointer(run_dir / "as-it-is", model=model, max_shard_size="50KB") as ckpt:
        ckpt.save_hf(1)
        _doubled(model)
        ckpt.save_hf(2)
        frames = ckpt._frames
        assert frames is not None
        (staging,) = frames._stagings.values()
        owned = sum(bool(gather.tensors) for gather in staging.gathers)
    with stillframe.Checkpointer(run_dir / "cast", model=model, save_dtype="bfloat16") as ckpt:
        ckpt.save_hf(2)
        ckpt.save_both(3)
    return owned


@pytest.mark.parametrize("way", WAYS)
def test_computed_keys_are_those_of_the_unsharded_save(way: str, tmp_path: Path) -> None:
    owned = run_ranks(WAYS[way][0], _save, tmp_path / "run", way)
    model = _model()
    model.save_pretrained(tmp_path / "first", max_shard_size="50KB")
    _doubled(model)
    model.save_pretrained(tmp_path / "second", max_shard_size="50KB")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "cast")
    for name, step, saved in (
        ("first", 1, "as-it-is"),
        ("second", 2, "as-it-is"),
        ("cast", 2, "cast"),
        ("cast", 3, "cast"),
    ):
        found = digests(tmp_path / "run" / saved / f"hf-{step}")
        assert found.pop("stillframe.json")
        assert found == digests(tmp_path / name)
    assert (read_manifest(tmp_path / "run" / "cast" / "hf-2").reshuffled is not None) == (way == "fsdp_tp")
    done = read_manifest(tmp_path / "run" / "cast" / "hf-3").gathered
    assert done is not None
    assert done.bucket_bytes == BUCKET_BYTES
    assert len(done.keys) == 4
    assert all(re.fullmatch(COMPUTED, key) for key in done.keys)
    assert sum(owned) == 4  # groups, shared out among the ranks
    assert max(owned) - min(owned) <= 1
    (other,) = WAYS.keys() - {way}
    directory = tmp_path / "run" / "as-it-is" / "hf-1"
    held = 0
    for bytes_read, local_bytes in run_ranks(WAYS[other][0], _load, directory, other):
        assert local_bytes < bytes_read < local_bytes + _converted_bytes(_model())
        held += local_bytes
    assert held >= sum(parameter.nbytes for parameter in _model().parameters())


def _converted_bytes(model: PreTrainedModel) -> int:
    """What must be read whole for any part: queries, keys and values of the vision tower, one tensor in files."""
    converted = r"vision_tower\.layers\.\d\.attn\.[qkv]_proj\.(weight|bias)"
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if re.search(converted, name))


@torch.no_grad()
def _load(directory: Path, way: str) -> tuple[int, int]:
    """What this rank read, and what it holds; all have the values that Transformers loads, which computes the same."""
    model = WAYS[way][1]()
    _doubled(model)
    report = stillframe.load_hf(directory, model)
    assert (report.missing, report.unexpected) == ((), ())
    expected = _model().from_pretrained(directory).state_dict()
    found = dict(model.state_dict())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole.view(torch.uint8), expected[name].view(torch.uint8)), name
    local_bytes = sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())
    return report.bytes_read, local_bytes


def _save_for_the_hub(run_dir: Path, most_elements: int) -> int:
    tracing._MAX_SINGLE_ELEMENTS, gather.BUCKET_BYTES = most_elements, BUCKET_BYTES
    model = tiny_qwen3_vl_moe()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        for name, parameter in list(layer.mlp.experts.named_parameters()):
            placed = distribute_tensor(parameter.data, mesh, [Shard(1 if name.startswith("gate") else 2)])
            setattr(layer.mlp.experts, name, nn.Parameter(placed))
    with stillframe.Checkpointer(run_dir, model=model, layout="hub") as ckpt:
        ckpt.save_hf(1)
        ckpt.save_both(2)
        assert ckpt._frames is not None
        return max(len(plan.files[0].extents) for plan in ckpt._frames._write_plans() if plan.files)


def test_transposes_that_shards_cut_are_made_by_one_rank_where_they_are_too_large_for_a_run_each(
    tmp_path: Path,
) -> None:
    run_ranks(2, _save_for_the_hub, tmp_path / "gathered", 1000)
    run_ranks(2, _save_for_the_hub, tmp_path / "direct", 1 << 22)
    for step in (1, 2):
        found, expected = (digests(tmp_path / way / f"hf-{step}") for way in ("gathered", "direct"))
        assert found.pop("stillframe.json") != expected.pop("stillframe.json")
        assert found == expected
    assert read_manifest(tmp_path / "direct" / "hf-1").gathered is None
    done = read_manifest(tmp_path / "gathered" / "hf-1").gathered
    assert done is not None
    assert len(done.keys) == 6
    assert all("mlp.experts" in key for key in done.keys)


def _of_rows() -> nn.Module:
    """Cut along its columns: ranks exchange rows."""
    module = nn.Module()
    mesh = init_device_mesh("cpu", (2,))
    module.matrix = nn.Parameter(distribute_tensor(torch.arange(64.0).view(8, 8), mesh, [Shard(1)]))
    return module


EXCHANGING: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gathered": (_fsdp, {}),
    "reshuffled": (_of_rows, {"key_mapping": {}}),
}


def _fail_early(run_dir: Path, how: str) -> str:
    """A rank whose snapshot fails before it comes to the others, which wait for it."""
    make, options = EXCHANGING[how]
    with stillframe.Checkpointer(run_dir, model=make(), **options) as ckpt:
        with pytest.raises(SaveFailed) as failed:
            ckpt.save_hf(1, metrics={"loss": "high"} if dist.get_rank() == 0 else None)
        manifest = read_manifest(ckpt.save_hf(2))
        assert getattr(manifest, how) is not None
    return str(failed.value)


@pytest.mark.parametrize("how", EXCHANGING)
def test_a_rank_that_fails_before_keeps_nobody_waiting(how: str, tmp_path: Path) -> None:
    first, second = run_ranks(2, _fail_early, tmp_path, how)
    assert "metrics: 'loss' must be a number" in first
    assert "rank 0 failed in its snapshot" in second or "metrics" in second
    assert not (tmp_path / "hf-1").exists()
    assert (tmp_path / "hf-2").is_dir()
