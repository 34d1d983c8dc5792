"""What was saved on one mesh is loaded on another: bit-identical, whatever the two are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import stillframe
from stillframe.testing import run_ranks
from tests.multirank.exports import MODELS, build, distribute
from tests.multirank.test_parallelism import BY_HAND


def _made(name: str, how: str) -> PreTrainedModel:
    return BY_HAND[how][1]() if how in BY_HAND else distribute(build(name, None), how)


def _save(run_dir: Path, name: str, how: str) -> None:
    with stillframe.Checkpointer(run_dir, model=_made(name, how), max_shard_size="50KB") as ckpt:
        ckpt.save_hf(1)


def _load(run_dir: Path, name: str, how: str) -> dict[str, torch.Tensor]:
    """The whole tensors after loading into a model that had other values everywhere."""
    model = _made(name, how)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.fill_(-7)
    stillframe.load_hf(run_dir / "hf-latest", model)
    return {
        key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for key, tensor in model.state_dict().items()
    }


CASES = [
    ("qwen3", "fsdp", 2, "fsdp", 3),
    ("qwen3", "fsdp_tp", 4, "fsdp", 2),
    ("qwen3", "fsdp", 3, "fsdp_tp", 4),
    ("qwen3_moe", "fsdp", 4, "fsdp_ep", 4),
    ("qwen3_moe", "fsdp_ep", 4, "fsdp", 3),
    ("qwen3_moe", "hsdp", 4, "replicated", 2),
    ("qwen3_vl_moe", "fsdp", 3, "fsdp", 2),
    ("qwen3_vl_moe", "replicated", 1, "fsdp", 4),
]


@pytest.mark.parametrize(("name", "saved_as", "saved_on", "loaded_as", "loaded_on"), CASES)
def test_any_mesh_to_any_other(
    name: str, saved_as: str, saved_on: int, loaded_as: str, loaded_on: int, tmp_path: Path
) -> None:
    run_ranks(saved_on, _save, tmp_path, name, saved_as)
    expected = MODELS[name]().state_dict()
    for loaded in run_ranks(loaded_on, _load, tmp_path, name, loaded_as):
        assert loaded.keys() == expected.keys()
        for key, tensor in expected.items():
            assert tensor.dtype == loaded[key].dtype
            assert torch.equal(tensor.view(torch.uint8), loaded[key].view(torch.uint8)), key
