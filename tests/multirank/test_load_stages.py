"""load_hf into the stages of a pipeline: each rank takes its part, strict over all of them; all learn of a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import stillframe
from stillframe.errors import LoadError, ModelMismatch, NotACheckpoint, StillframeError, UnsupportedModel
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe
from tests.multirank.stages import cut

MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "tied": lambda seed: tiny_qwen3(seed=seed),
    "untied": lambda seed: tiny_qwen3(tied=False, seed=seed),
    "moe": lambda seed: tiny_qwen3_moe(seed=seed),
}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in state.items()}


def save_and_load(
    run_dir: Path, saves: list[tuple[str, str]], loads: list[tuple[str, str, str]]
) -> list[dict[str, torch.Tensor]]:
    """Save models from stages; then load, of each that was, into this rank's part of one with other values. What the
    parts have then."""
    for name, how in saves:
        with stillframe.Checkpointer(
            run_dir / f"{name} {how}", model=cut(MODELS[name](0), how), pipeline=True, max_shard_size="50KB"
        ) as ckpt:
            ckpt.save_hf(1)
    found = []
    for name, saved, how in loads:
        model = cut(MODELS[name](1), how)
        directory = run_dir / f"{name} {saved}" / "hf-1"
        report = stillframe.load_hf(directory, model, pipeline=how != "fsdp", timeout_s=60)
        assert (report.missing, report.unexpected) == ((), ())
        assert report.bytes_read == sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())
        found.append(whole(model))
    return found


JOBS: list[tuple[int, list[tuple[str, str]], list[tuple[str, str, str]]]] = [
    (2, [("tied", "pp2"), ("untied", "v")], [("tied", "pp2", "v"), ("tied", "pp2", "fsdp"), ("untied", "v", "pp2")]),
    (4, [("moe", "pp2 fsdp")], [("moe", "pp2 fsdp", "pp2 own"), ("tied", "pp2", "pp2 fsdp")]),
    (3, [], [("moe", "pp2 fsdp", "pp3"), ("moe", "pp2 fsdp", "fsdp"), ("tied", "pp2", "pp3")]),
]
"""Ranks; models and their stages that are saved; models that are loaded: as what they were saved, and into what."""


def test_what_stages_saved_is_loaded_into_others_and_into_none(tmp_path: Path) -> None:
    for ranks, saves, loads in JOBS:
        of_ranks = run_ranks(ranks, save_and_load, tmp_path, saves, loads)
        for number, (name, _, how) in enumerate(loads):
            expected = whole(MODELS[name](0))
            for of_rank in of_ranks:
                for key, tensor in of_rank[number].items():
                    assert torch.equal(tensor, expected[key]), (name, how, key)
            assert set[str]().union(*(of_rank[number] for of_rank in of_ranks)) == expected.keys()


# What does not fit is known to all


def _rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _swapped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "extra": lambda tensors: tensors.update({"model.layers.9.odd.weight": torch.ones(2)}),
    "gone": lambda tensors: tensors.pop("model.norm.weight"),
    "shape": lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
    "untied": _swapped,
}


def refused(directory: Path, error: type[StillframeError], message: str) -> None:
    model = cut(tiny_qwen3(seed=1), "pp2")
    before = whole(model)
    with pytest.raises(error, match=message):
        stillframe.load_hf(directory, model, pipeline=True, timeout_s=60)
    after = whole(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def lenient(directory: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    report = stillframe.load_hf(directory, cut(tiny_qwen3(seed=1), "pp2"), pipeline=True, timeout_s=60, strict=False)
    return report.missing, report.unexpected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("extra", r"1 keys in the files are unknown to the model: model\.layers\.9\.odd\.weight"),
        ("gone", r"1 tensors of the model are not in the files: model\.norm\.weight \(on rank 1\)"),
        ("shape", r"model\.norm\.weight \(on rank 1\) has shape \(3,\) in the files, \(56,\) in the model"),
        ("untied", r"lm_head\.weight and model\.embed_tokens\.weight are one tensor .* different values"),
    ],
)
def test_what_no_stage_takes_or_one_lacks_is_refused_on_every_rank(tmp_path: Path, change: str, message: str) -> None:
    tiny_qwen3().save_pretrained(tmp_path)
    _rewritten(tmp_path, CHANGES[change])
    run_ranks(2, refused, tmp_path, ModelMismatch, message)
    if change in ("extra", "gone"):
        missing, unexpected = ("model.norm.weight",), ("model.layers.9.odd.weight",)
        found = run_ranks(2, lenient, tmp_path)
        if change == "extra":
            assert found == [((), unexpected)] * 2
        else:
            assert found == [((), ()), (missing, ())]


def one_rank_fails(base_dir: Path, how: str) -> None:
    """Then, of the same ranks, a load that succeeds: no rank is behind the others."""
    rank = dist.get_rank()
    directory, model, kind, message, timeout_s = base_dir / "a", cut(tiny_qwen3(seed=1), "pp2"), LoadError, "", 60.0
    if how == "no directory":
        directory = directory if rank == 0 else base_dir / "none"
        kind, message = NotACheckpoint, "none"
    elif how == "other files":
        directory = base_dir / "ab"[rank]
        message = "rank 0 and rank 1 find different tensors in the files"
    elif how == "no model":
        model = model if rank == 1 else nn.Linear(2, 2)
        kind, message = UnsupportedModel, "Linear is not a transformers PreTrainedModel"
    elif how == "absent":
        message, timeout_s = "rank 1 did not say within 1 s", 1.0
    if how == "absent" and rank == 1:
        return
    with pytest.raises(kind, match=message) as raised:
        stillframe.load_hf(directory, model, pipeline=True, timeout_s=timeout_s)
    assert how not in ("no directory", "no model") or str(raised.value).startswith("rank ") != (
        rank == {"no directory": 1, "no model": 0}[how]
    )
    if how != "absent":
        model = cut(tiny_qwen3(seed=1), "pp2")
        stillframe.load_hf(base_dir / "a", model, pipeline=True, timeout_s=60)
        expected = tiny_qwen3().state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in whole(model).items())


@pytest.mark.parametrize("how", ["no directory", "other files", "no model", "absent"])
def test_a_rank_that_cannot_load_keeps_nobody_waiting(tmp_path: Path, how: str) -> None:
    tiny_qwen3().save_pretrained(tmp_path / "a")
    tiny_qwen3().save_pretrained(tmp_path / "b")
    _rewritten(tmp_path / "b", CHANGES["extra"])
    run_ranks(2, one_rank_fails, tmp_path, how)


def parts_of_a_module(directory: Path) -> dict[str, torch.Tensor]:
    """Each rank's part has names of its own, and its own mapping to those of the files."""
    rank = dist.get_rank()
    part: nn.Module = (
        nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)) if rank == 0 else nn.ModuleDict({"out": nn.Linear(6, 3)})
    )
    mapping = {r"^0\.": "first.", r"^1\.": "second."} if rank == 0 else {r"^out\.": "0."}
    stillframe.load_hf(directory, part, pipeline=True, key_mapping=mapping, timeout_s=60)
    return whole(part)


def test_parts_with_names_of_their_own_are_loaded_by_mappings_of_their_own(tmp_path: Path) -> None:
    shapes = {"first": (4, 5), "second": (5, 6), "0": (6, 3)}
    stored = {}
    for name, (into, out) in shapes.items():
        stored |= {f"{name}.weight": torch.randn(out, into), f"{name}.bias": torch.randn(out)}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    first, second = run_ranks(2, parts_of_a_module, tmp_path)
    names = {"0": "first", "1": "second", "out": "0"}
    found = {f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": t for key, t in (first | second).items()}
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in stored.items())
