"""Ranks whose models are stages of a pipeline: exports as of the whole model, checkpoints onto other stages or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import PreTrainedModel

import stillframe
from stillframe.errors import SaveFailed, StillframeError
from stillframe.testing import run_process, run_ranks
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe
from tests.multirank.checkpoints import Run
from tests.multirank.exports import digests
from tests.multirank.stages import cut, pipeline_mesh

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": tiny_qwen3,
    "untied": lambda: tiny_qwen3(tied=False),
    "moe": tiny_qwen3_moe,
}
# Model, its stages, and the ranks that it is exported from.
EXPORTS = [
    ("tied", "pp2", 2),
    ("untied", "v", 2),
    ("untied", "pp2", 4),
    ("moe", "pp2 fsdp", 4),
    ("tied", "pp2 fsdp", 4),
    ("untied", "pp2 own", 4),
    ("untied", "pp3", 3),
]


def export_stages(run_dir: Path, cases: list[tuple[str, str]]) -> list[int]:
    staged = []
    for name, how in cases:
        model = cut(MODELS[name](), how)
        for size in ("50GB", "50KB"):
            with stillframe.Checkpointer(
                run_dir / f"{name} {how} {size}", model=model, pipeline=True, max_shard_size=size, save_timeout_s=60
            ) as ckpt:
                ckpt.save_hf(1)
                staged.append(ckpt.reports[-1].staged_bytes)
    return staged


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_an_export_of_stages_is_that_of_the_whole_model(tmp_path: Path, ranks: int) -> None:
    cases = [(name, how) for name, how, count in EXPORTS if count == ranks]
    staged = run_ranks(ranks, export_stages, tmp_path, cases)
    for name, how in cases:
        for size in ("50GB", "50KB"):
            reference = tmp_path / f"{name} {size}"
            MODELS[name]().save_pretrained(reference, max_shard_size=size)
            found = digests(tmp_path / f"{name} {how} {size}" / "hf-1")
            del found["stillframe.json"]
            assert found == digests(reference), (name, how, size)
    if ranks == 4:  # what the ranks of one stage hold alike is shared out among them
        for of_rank, of_other in zip(staged[0], staged[1], strict=True):
            assert abs(of_rank - of_other) < 20_000


# Checkpoints

ANYWHERE = {"reset": ("rng", "dataloader")}
MEMBERS = "optimizer.param_groups.0.params"


def run_of(name: str, how: str, *, salt: float = 0.0) -> Run:
    return Run(how, salt=salt, make=lambda: MODELS[name]() if how == "alone" else cut(MODELS[name](), how))


def options(how: str) -> dict[str, Any]:
    return {"pipeline": how.startswith("pp")}


def save_two_steps(run_dir: Path, name: str, how: str) -> None:
    run = run_of(name, how)
    with run.checkpointer(run_dir, **options(how)) as ckpt:
        run.step()
        ckpt.save(1)
        run.step()
        ckpt.save_both(2)


def resume_on(run_dir: Path, name: str, hows: tuple[str, ...]) -> list[dict[str, str]]:
    found = []
    for how in hows:
        run = run_of(name, how, salt=0.5)
        with run.checkpointer(run_dir / f"resumed {how}", **options(how)) as ckpt:
            ckpt.resume(run_dir / "checkpoint-2", **ANYWHERE)
            run.step()
            found.append(run.digests())
    return found


def whole_after(name: str, steps: int) -> dict[str, str]:
    run = run_of(name, "alone")
    run.step(steps)
    return run.digests()


def read_by_stock_torch(run_dir: Path, name: str) -> None:
    run = run_of(name, "alone", salt=0.5)
    model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(state, storage_reader=dcp.FileSystemReader(run_dir / "checkpoint-2"), no_dist=True)
    set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    found, expected = run.digests(), whole_after(name, 2)
    # Of the scheduler torch's directories know nothing; the learning rate is in the optimizer.
    assert found == expected


def assert_is_whole(of_ranks: list[dict[str, str]], expected: dict[str, str]) -> None:
    """What the ranks have together is `expected`, and what two of them have they have alike."""
    found: dict[str, str] = {}
    for of_rank in of_ranks:
        for key, digest in of_rank.items():
            if key != MEMBERS:
                assert found.setdefault(key, digest) == digest, key
    del expected[MEMBERS]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "saved_on", "resumed_on"),
    [
        ("tied", (4, "pp2 fsdp"), [(2, ("pp2", "fsdp")), (3, ("pp3",)), (1, ("alone",))]),
        ("moe", (2, "pp2"), [(4, ("pp2 own", "fsdp"))]),
        ("untied", (2, "fsdp"), [(2, ("pp2",)), (4, ("pp2 fsdp",))]),
    ],
)
def test_a_checkpoint_of_stages_resumes_on_others_or_none(
    tmp_path: Path, name: str, saved_on: tuple[int, str], resumed_on: list[tuple[int, tuple[str, ...]]]
) -> None:
    run_ranks(saved_on[0], save_two_steps, tmp_path, name, saved_on[1])
    for ranks, hows in resumed_on:
        found = run_ranks(ranks, resume_on, tmp_path, name, hows)
        for index in range(len(hows)):
            assert_is_whole([of_rank[index] for of_rank in found], run_process(whole_after, name, 3))
    run_process(read_by_stock_torch, tmp_path, name)
    reference = tmp_path / "reference"
    run_process(save_whole, reference, name)
    assert {n: d for n, d in digests(tmp_path / "hf-2").items() if n != "stillframe.json"} == digests(reference)


def save_whole(directory: Path, name: str) -> None:
    run = run_of(name, "alone")
    run.step(2)
    run.model.save_pretrained(directory)  # type: ignore[operator]


# What does not fit is refused, on every rank, by name


def refused(run_dir: Path, change: str, pipeline: bool) -> None:
    rank = dist.get_rank()
    model = cut(tiny_qwen3(tied=False), "pp2")
    if change == "shape" and rank == 1:
        model.model.embed_tokens = nn.Embedding(388, 48)
    elif change == "dtype" and rank == 1:
        model.model.embed_tokens = nn.Embedding(388, 56, dtype=torch.bfloat16)
    elif change == "class" and rank == 1:
        model = model.model
    elif change == "hole":
        mesh = pipeline_mesh(1)["fsdp"]
        if rank == 1:
            model.model.norm.weight = nn.Parameter(distribute_tensor(torch.ones(56), mesh, [Shard(0)]))
        else:
            distribute_tensor(torch.ones(56), mesh, [Shard(0)])
    elif change == f"module {rank}":
        model = nn.Linear(2, 2)
    elif change == "unsupported" and rank == 1:
        model.model.norm.weight = nn.Parameter(torch.ones(56, device="meta"))
    said = {
        "names": r"rank 1 has another layout .* model\.embed_tokens\.weight\. Ranks .* pass pipeline=True",
        "shape": r"embed_tokens\.weight: is \(388, 56\) float32 on rank 0 and \(388, 48\) float32 on rank 1",
        "dtype": r"embed_tokens\.weight: is \(388, 56\) float32 on rank 0 and \(388, 56\) bfloat16 on rank 1",
        "class": "rank 0 has a Qwen3ForCausalLM and rank 1 a Qwen3Model",
        "hole": r"model\.norm\.weight: no rank holds its shard \(0,\) of",
        "module 0": "Linear is not a transformers PreTrainedModel|rank 0 has a Linear and rank 1 a Qwen3ForCausalLM",
        "module 1": "Linear is not a transformers PreTrainedModel|rank 0 has a Qwen3ForCausalLM and rank 1 a Linear",
        "unsupported": r"1 parameters have no values yet .*model\.norm\.weight|norm\.weight: has no values yet",
    }
    with pytest.raises(StillframeError, match=said[change]):
        stillframe.Checkpointer(run_dir, model=model, pipeline=pipeline, save_timeout_s=60)
    with pytest.raises(StillframeError, match=said[change]):
        stillframe.Checkpointer(run_dir, model=model, pipeline=pipeline, hf_export=change == "names", save_timeout_s=60)


@pytest.mark.parametrize("change", ["names", "shape", "dtype", "class", "hole", "unsupported", "module 0", "module 1"])
def test_stages_that_do_not_fit_are_refused_on_every_rank(tmp_path: Path, change: str) -> None:
    run_ranks(2, refused, tmp_path, change, change != "names")


def late_state(run_dir: Path) -> None:
    """The state of one stage's parameters appears after the ranks told each other what they hold."""
    run = run_of("untied", "pp2")
    with run.checkpointer(run_dir, pipeline=True) as ckpt:
        if dist.get_rank() == 0:
            run.step()
        ckpt.save(1)
        if dist.get_rank() == 1:
            run.step()
        with pytest.raises(SaveFailed, match=r"on rank 1 in stage 'snapshot' .* Call prepare\(\) on every rank"):
            ckpt.save(2)
        ckpt.prepare()
        with CommDebugMode() as traffic:
            ckpt.save(3)
            ckpt.save(4)
        assert traffic.get_total_counts() == 0
        with pytest.raises(SaveFailed, match="train_state must be"):
            ckpt.save_both(5, train_state={"bad": {1}} if dist.get_rank() == 0 else None)
        with pytest.raises(SaveFailed, match="train_state must be"):
            ckpt.check()  # of the export
        ckpt.save_both(5)


def test_state_that_appears_on_one_stage_asks_for_a_new_exchange(tmp_path: Path) -> None:
    run_ranks(2, late_state, tmp_path)
