"""Exports of a pipeline's stages in other layouts than the plain one: as of the whole model, whoever holds what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import stillframe
from stillframe.layout import gather, tracing
from stillframe.manifest import read_manifest
from stillframe.testing import run_process, run_ranks
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_vl_moe
from tests.models.tiny_models import tiny_model
from tests.multirank.exports import digests
from tests.multirank.fp8 import moe_with_partial_blocks


def _kimi() -> PreTrainedModel:
    """Kimi-K2.5, whose vision tower has the rows of queries and keys in another order in files."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return tiny_model("kimi_k25", seed=0)


def _is_first() -> bool:
    """Ranks 0 and 1 have the first stage, rank 2 has the second."""
    return dist.get_rank() < 2


def _cut_layers(model: Any) -> Any:
    """The first stage has the first layer and what comes before it, the second all others."""
    text = getattr(model.model, "language_model", model.model)
    layers = list(text.layers.named_children())
    text.layers = nn.ModuleDict(dict(layers[:1] if _is_first() else layers[1:]))
    if _is_first():
        text.norm, model.lm_head = None, None
    else:
        text.embed_tokens, model.model.visual = None, None
    return model


def _in_fsdp(model: Any, mesh: DeviceMesh) -> Any:
    model = _cut_layers(model)
    return fully_shard(model, mesh=mesh) if _is_first() else model


def _by_columns(model: Any, mesh: DeviceMesh) -> Any:
    model = _cut_layers(model)
    if _is_first():
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh, [Shard(1)]))
    return model


def _matrices_cut(model: Any, mesh: DeviceMesh) -> Any:
    model = _cut_layers(model)
    for layer in model.model.language_model.layers.values() if _is_first() else ():
        for name, parameter in list(layer.mlp.experts.named_parameters()):
            placed = distribute_tensor(parameter.data, mesh, [Shard(1 if name.startswith("gate") else 2)])
            setattr(layer.mlp.experts, name, nn.Parameter(placed))
    return model


def _towers(model: Any, mesh: DeviceMesh) -> Any:
    """The first stage is the vision tower, and knows nothing of the language model's conversions."""
    if not _is_first():
        model.model.vision_tower = None
        return model
    model.model.language_model, model.lm_head = None, None
    for layer in model.model.vision_tower.layers:
        fully_shard(layer, mesh=mesh)
    return model


class Case(NamedTuple):
    make: Callable[[], PreTrainedModel]
    cut: Callable[[PreTrainedModel, DeviceMesh], Any]
    options: dict[str, Any]


CASES: dict[str, Case] = {
    "fp8": Case(moe_with_partial_blocks, _in_fsdp, {"save_dtype": "fp8"}),
    "fp8 by columns": Case(moe_with_partial_blocks, _by_columns, {"save_dtype": "fp8", "keep_in_bf16": "k_proj"}),
    "hub": Case(tiny_qwen3_vl_moe, _in_fsdp, {"layout": "hub"}),
    "hub cut": Case(tiny_qwen3_vl_moe, _matrices_cut, {"layout": "hub"}),
    "computed": Case(_kimi, _towers, {}),
    "computed cast": Case(_kimi, _towers, {"save_dtype": "bfloat16"}),
    "reshuffled": Case(lambda: tiny_qwen3(tied=False), _by_columns, {}),
}


OWN_FILES: dict[str, Case] = {
    "own files": Case(tiny_qwen3_vl_moe, _in_fsdp, {"file_naming": "per_rank"}),
    "own files, tied": Case(tiny_qwen3, _in_fsdp, {"file_naming": "per_rank"}),
}


def _save(run_dir: Path) -> dict[str, set[str]]:
    """Returns the files of weights that this rank wrote parts of."""
    gather.BUCKET_BYTES, tracing._MAX_SINGLE_ELEMENTS = 1024, 1000
    meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2])]
    written: dict[str, set[str]] = {}
    for name, case in (CASES | OWN_FILES).items():
        model = case.cut(case.make(), meshes[0])
        with stillframe.Checkpointer(
            run_dir / name, model=model, pipeline=True, max_shard_size="100KB", save_timeout_s=60, **case.options
        ) as ckpt:
            ckpt.save_hf(1)
            ckpt.save_both(2)
            assert ckpt._frames is not None
            plans = (ckpt._frames._stagings["hf"].plans[0], ckpt._frames._stagings["both"].plans[1])
            written[name] = {file.name for plan in plans for file in plan.files}
    return written


def _save_whole(run_dir: Path) -> None:
    for name, case in (CASES | OWN_FILES).items():
        model = case.make()
        if name in OWN_FILES or not case.options:
            model.save_pretrained(run_dir / name / "hf-1", max_shard_size="100KB" if name in CASES else "1GB")
            continue
        with stillframe.Checkpointer(run_dir / name, model=model, max_shard_size="100KB", **case.options) as ckpt:
            ckpt.save_hf(1)


class Saved(NamedTuple):
    stages_dir: Path
    whole_dir: Path
    written: list[dict[str, set[str]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    base_dir = tmp_path_factory.mktemp("layouts")
    written = run_ranks(3, _save, base_dir / "stages")
    run_process(_save_whole, base_dir / "whole")
    return Saved(base_dir / "stages", base_dir / "whole", written)


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_the_whole_model(saved: Saved, name: str) -> None:
    expected = digests(saved.whole_dir / name / "hf-1")
    expected.pop("stillframe.json", None)
    for step in (1, 2):
        found = digests(saved.stages_dir / name / f"hf-{step}")
        assert found.pop("stillframe.json")
        assert found == expected, step


@pytest.mark.parametrize("name", OWN_FILES)
def test_each_rank_writes_files_of_its_own_with_whole_tensors_of_its_stage(saved: Saved, name: str) -> None:
    expected = load_file(saved.whole_dir / name / "hf-1" / "model.safetensors")
    first_stage = set()
    for step in (1, 2):
        export_dir = saved.stages_dir / name / f"hf-{step}"
        found = {}
        for rank, written in enumerate(saved.written):
            own = {path.name for path in export_dir.glob(f"*-save_rank{rank}.safetensors")}
            assert own == written[name]
            assert own
            for file in own:
                tensors = load_file(export_dir / file)
                assert tensors.keys().isdisjoint(found)
                found |= tensors
                first_stage |= set() if rank == 2 else tensors.keys()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        index = json.loads((export_dir / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys()
        gathered = read_manifest(export_dir).gathered
        assert gathered is not None
        assert set(gathered.keys) <= first_stage  # the rank of the second stage has its tensors whole


def test_what_travels_is_said(saved: Saved) -> None:
    manifests = {name: read_manifest(saved.stages_dir / name / "hf-1") for name in CASES}
    gathered = {name for name, manifest in manifests.items() if manifest.gathered is not None}
    assert gathered == {"hub cut", "computed", "computed cast"}
    assert {name for name, manifest in manifests.items() if manifest.reshuffled is not None} == {"reshuffled"}
