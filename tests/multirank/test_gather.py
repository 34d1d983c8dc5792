"""Keys that a conversion computes, and large transposes that shards cut: one rank makes them of what the others hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import stillframe
from stillframe.layout import gather
from stillframe.manifest import read_manifest
from stillframe.testing import run_ranks
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
    """Queries are cut along their columns, keys along their rows, and both again by FSDP; biases are whole."""
    model = _model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    for layer in model.model.vision_tower.layers:
        for name, dim in (("q_proj", 1), ("k_proj", 0)):
            linear = getattr(layer.attn, name)
            linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight.data, mesh["tp"], [Shard(dim)]))
        fully_shard(layer, mesh=mesh["fsdp"])
    return model


WAYS: dict[str, tuple[int, Callable[[], PreTrainedModel]]] = {
    "replicated": (2, _model),
    "fsdp": (3, _fsdp),
    "fsdp_tp": (4, _fsdp_and_tensor_parallel),
}


class _Made(TorchDispatchMode):
    """The sizes of all new memory that operations ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if re.search("empty|clone|cat|_to_copy|zeros|stack", str(func)):
            self.bytes.append(result.nbytes)
        return result


def _doubled(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            getattr(parameter, "_local_tensor", parameter).mul_(2)


def _save(run_dir: Path, way: str) -> tuple[list[int], int]:
    gather.BUCKET_BYTES = BUCKET_BYTES
    model = WAYS[way][1]()
    with stillframe.Checkpointer(run_dir / "as-it-is", model=model, max_shard_size="50KB") as ckpt:
        ckpt.save_hf(1)
        _doubled(model)
        with _Made() as made:
            ckpt.save_hf(2)
        frames = ckpt._frames
        assert frames is not None
        (staging,) = frames._stagings.values()
        owned = sum(bool(gather.tensors) for gather in staging.gathers)
    with stillframe.Checkpointer(run_dir / "cast", model=model, save_dtype="bfloat16") as ckpt:
        ckpt.save_hf(2)
        ckpt.save_both(3)
    return made.bytes, owned


@pytest.mark.parametrize("way", WAYS)
def test_computed_keys_are_those_of_the_unsharded_save(way: str, tmp_path: Path) -> None:
    made = run_ranks(WAYS[way][0], _save, tmp_path / "run", way)
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
    done = read_manifest(tmp_path / "run" / "cast" / "hf-3").gathered
    assert done is not None
    assert done.bucket_bytes == BUCKET_BYTES
    assert len(done.keys) == 4
    assert all(re.fullmatch(COMPUTED, key) for key in done.keys)
    assert sum(owned for _, owned in made) == 4  # groups, shared out among the ranks
    assert max(owned for _, owned in made) - min(owned for _, owned in made) <= 1
