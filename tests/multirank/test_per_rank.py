"""file_naming="per_rank": each rank writes files of its own, and from_pretrained loads the directory, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import stillframe
from stillframe.errors import OptionError
from stillframe.layout import gather
from stillframe.manifest import read_manifest
from stillframe.testing import run_process, run_ranks
from stillframe.testing.models import tiny_qwen3
from tests.multirank.exports import build, companions, distribute
from tests.multirank.test_parallelism import BY_HAND

NAME = re.compile(r"(model|language|vision|projector)-\d{4}-save_rank(\d)\.safetensors")

WAYS: dict[str, tuple[str, int, Callable[[], Any]]] = {
    "fsdp": ("qwen3_vl_moe", 3, lambda: distribute(build("qwen3_vl_moe", None), "fsdp")),
    "ddp": ("qwen3", 2, lambda: distribute(build("qwen3", None), "ddp")),
    "fsdp_tp": ("qwen3", 4, BY_HAND["fsdp_tp"][1]),
    "fsdp_ep": ("qwen3_moe", 4, BY_HAND["fsdp_ep"][1]),
}


def _save(run_dir: Path, way: str) -> list[set[str]]:
    """Returns the names of the weights files that this rank writes parts of, of an export alone and of one of both."""
    gather.BUCKET_BYTES = 4096
    name, _, make = WAYS[way]
    with stillframe.Checkpointer(
        run_dir, model=make(), file_naming="per_rank", max_shard_size="100KB", **companions(name)
    ) as ckpt:
        ckpt.save_hf(1)
        ckpt.save_both(2)
        assert ckpt._frames is not None
        exports = (ckpt._frames._stagings["hf"].plans[0], ckpt._frames._stagings["both"].plans[1])
        return [{file.name for file in plan.files} for plan in exports]


def _pretrained(directory: Path, name: str) -> dict[str, torch.Tensor]:
    auto = AutoModelForImageTextToText if name == "qwen3_vl_moe" else AutoModelForCausalLM
    model, found = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize("way", WAYS)
def test_each_rank_writes_whole_tensors_into_files_of_its_own(way: str, tmp_path: Path) -> None:
    name, world_size, _ = WAYS[way]
    written = run_ranks(world_size, _save, tmp_path, way)
    model = build(name, None)
    for step in (1, 2):
        export_dir = tmp_path / f"hf-{step}"
        files = {path.name: path for path in export_dir.glob("*.safetensors")}
        for rank, names in enumerate(written):
            assert names[step - 1] == {file for file in files if f"-save_rank{rank}." in file}
        prefixes = set()
        stored = 0
        for file, path in files.items():
            matched = NAME.fullmatch(file)
            assert matched is not None
            prefixes.add(matched[1])
            with safe_open(path, framework="pt") as content:
                stored += len(content.keys())
        assert prefixes == ({"language", "vision", "projector"} if name == "qwen3_vl_moe" else {"model"})
        index = json.loads((export_dir / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert len(index["weight_map"]) == stored
        assert index["metadata"]["total_parameters"] == model.num_parameters()
        manifest = read_manifest(export_dir)
        assert manifest.balance < 1.25  # what is largest here is a large part of a share
        assert (manifest.gathered is None) == (way == "ddp")
    expected = model.state_dict()
    found = run_process(_pretrained, tmp_path / "hf-1", name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    stillframe.load_hf(tmp_path / "hf-2", model)
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_naming": "mine"}, "file_naming must be 'standard' or 'per_rank', not 'mine'"),
        ({"file_naming": "per_rank", "hf_export": False}, "has no effect with hf_export=False"),
        ({"file_naming": "per_rank", "save_dtype": "fp8"}, "does not go with save_dtype='fp8' yet"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        stillframe.Checkpointer(tmp_path, model=tiny_qwen3(), **options)
