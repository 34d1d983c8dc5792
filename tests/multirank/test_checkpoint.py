"""Checkpoints to resume from: saved on some ranks, resumed on as many or others, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import stillframe
from stillframe.catalog.directory import list_checkpoints
from stillframe.errors import CheckpointExists, ModelMismatch, SaveFailed
from stillframe.testing import run_process, run_ranks
from tests.multirank.checkpoints import PLACES, Run, draws
from tests.multirank.exports import digests


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def save(run_dir: Path, how: str, together: bool = False) -> tuple[dict[str, str], list[float]]:
    """Two steps, a save, and what follows: the digests of what was saved, and the numbers drawn after it."""
    torch.manual_seed(100 + rank())
    run = Run(how)
    run.step(2)
    run.position.at = 10 + rank()
    with run.checkpointer(run_dir) as ckpt:
        path = ckpt.save(2, train_state={"epoch": 1, "tokens": 12345, "note": "ü"})
        assert path == run_dir / "checkpoint-2"
        drawn = draws()
    return run.digests(), drawn


def resume(run_dir: Path, how: str, reset: tuple[str, ...] = ()) -> tuple[dict[str, str], list[float], int, Any]:
    run = Run(how, salt=0.5, lr=7.0)
    with run.checkpointer(run_dir) as ckpt:
        resumed = ckpt.resume(reset=reset)
        drawn = draws()
        assert resumed is not None
        assert resumed.path == run_dir / "checkpoint-2"
        assert resumed.step == 2
        assert resumed.train_state == {"step": 2, "epoch": 1, "tokens": 12345, "note": "ü"}
        assert run.scheduler.last_epoch == 2
    return run.digests(), drawn, run.position.at, resumed.left_as_they_are


@pytest.mark.parametrize(
    ("world_size", "how"),
    [(2, "fsdp"), (3, "fsdp moe"), (3, "ddp"), (3, "fsdp vl"), (4, "hsdp"), (4, "fsdp_tp"), (4, "fsdp_ep")],
)
def test_as_many_ranks_go_on_bit_for_bit(world_size: int, how: str, tmp_path: Path) -> None:
    saved = run_ranks(world_size, save, tmp_path, how)
    resumed = run_ranks(world_size, resume, tmp_path, how)
    for number, (before, after) in enumerate(zip(saved, resumed, strict=True)):
        assert after == (*before, 10 + number, ())


def test_one_process_without_torch_distributed(tmp_path: Path) -> None:
    before = run_process(save, tmp_path, "alone vl")
    assert run_process(resume, tmp_path, "alone vl") == (*before, 10, ())


@pytest.mark.parametrize(
    ("saved_by", "saved_as", "resumed_by", "resumed_as"),
    [
        (2, "fsdp", 4, "fsdp"),
        (4, "fsdp", 3, "fsdp"),
        (3, "ddp", 2, "fsdp"),
        (2, "fsdp", 4, "fsdp_tp"),
        (4, "fsdp_tp", 1, "fsdp"),
        (2, "fsdp moe", 4, "fsdp_ep"),
        (4, "fsdp_ep", 3, "fsdp moe"),
        (4, "hsdp", 2, "fsdp moe"),
    ],
)
def test_other_ranks_get_the_same_bits(
    saved_by: int, saved_as: str, resumed_by: int, resumed_as: str, tmp_path: Path
) -> None:
    assert PLACES[saved_as][0] == PLACES[resumed_as][0]
    saved = run_ranks(saved_by, save, tmp_path, saved_as)
    resumed = run_ranks(resumed_by, resume, tmp_path, resumed_as, ("rng", "dataloader"))
    assert all(one[0] == saved[0][0] for one in resumed)
    # Each rank had its own; neither can be divided anew.
    assert {one[2:] for one in resumed} == {(0, ("dataloader", "rng"))}


def resume_without_reset(run_dir: Path) -> str:
    run = Run("fsdp", salt=0.5)
    before = run.digests()
    with run.checkpointer(run_dir) as ckpt, pytest.raises(ModelMismatch) as caught:
        ckpt.resume()
    assert run.digests() == before
    return str(caught.value)


def test_what_cannot_be_divided_anew_is_named(tmp_path: Path) -> None:
    run_ranks(2, save, tmp_path, "fsdp")
    for message in run_ranks(3, resume_without_reset, tmp_path):
        assert "saved by 2 ranks and is loaded by 3; of dataloader, rng each rank had a state of its own" in message
        assert "reset=('dataloader', 'rng')" in message


def save_many(run_dir: Path) -> list[dict[str, str]]:
    """Asynchronous saves, the weights changed right after each call; the digests at each call."""
    run = Run("fsdp moe")
    at_calls = []
    with run.checkpointer(run_dir) as ckpt:
        for step in (1, 2, 3):
            run.step()
            at_calls.append(run.digests())
            ckpt.async_save(step, snapshot=step == 3)
        run.step()
        report = ckpt.reports[0]
        assert (report.kind, report.step) == ("checkpoint", 1)
    return at_calls


def resume_each(run_dir: Path) -> list[dict[str, str]]:
    found = []
    run = Run("fsdp moe", salt=0.1)
    with run.checkpointer(run_dir) as ckpt:
        for name in ("checkpoint-1", "checkpoint-2", "snapshot-3"):
            ckpt.resume(run_dir / name)
            found.append(run.digests())
    return found


def test_a_frame_is_that_of_its_call(tmp_path: Path) -> None:
    saved = run_ranks(2, save_many, tmp_path)
    assert [entry.path.name for entry in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "snapshot-3"]
    assert run_ranks(2, resume_each, tmp_path) == saved


def save_both(run_dir: Path, together: bool, how: str, dtype: str | None) -> list[int]:
    run = Run(how)
    run.step()
    staged = []
    with run.checkpointer(run_dir, publish_together=together, max_shard_size="50KB", save_dtype=dtype) as ckpt:
        ckpt.save_hf(1)
        ckpt.save(1)
        checkpoint, export = ckpt.save_both(2)
        staged = [report.staged_bytes for report in ckpt.reports[:3]]
        place = run_dir / "step-2" if together else run_dir
        assert checkpoint == (place / "checkpoint" if together else run_dir / "checkpoint-2")
        assert export == (place / "hf" if together else run_dir / "hf-2")
        # The same weights, unless anything was mixed up.
        ckpt.save_hf(3)
        ckpt.save(3)
    return staged


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("how", ["fsdp moe", "ddp"])
def test_both_of_one_step_are_what_each_is_alone(how: str, together: bool, dtype: str | None, tmp_path: Path) -> None:
    staged = run_ranks(2, save_both, tmp_path, together, how, dtype)
    checkpoint, export = (
        (tmp_path / "step-2" / name for name in ("checkpoint", "hf"))
        if together
        else (tmp_path / name for name in ("checkpoint-2", "hf-2"))
    )
    ours = {"stillframe.json", "train_state.json", ".metadata"}

    def files(directory: Path) -> dict[str, str]:
        return {n: d for n, d in digests(directory).items() if n not in ours and not n.startswith("state/")}

    assert files(export) == files(tmp_path / "hf-1") == files(tmp_path / "hf-3")
    assert files(checkpoint) == files(tmp_path / "checkpoint-1") == files(tmp_path / "checkpoint-3")
    for of_export, of_checkpoint, of_both in staged:
        if dtype is None:  # the headers of the export, and what the other format gives to another replica
            assert of_both < of_checkpoint + 0.2 * of_export
        else:
            assert of_both >= of_checkpoint + 0.5 * of_export
    if together:
        assert json.loads((tmp_path / "step-2" / "stillframe.json").read_text())["kind"] == "step"
        assert (tmp_path / "hf-latest").resolve() == tmp_path / "hf-3"


def refuse_existing(run_dir: Path) -> None:
    run = Run("fsdp")
    run.step()
    with run.checkpointer(run_dir) as ckpt:
        ckpt.save(1)
        with pytest.raises(CheckpointExists):
            ckpt.async_save(1)
        with pytest.raises(CheckpointExists):
            ckpt.async_save_both(1)
        ckpt.save_hf(1)
        for wrong in ({"train_state": {"pair": (1, 2)}}, {"train_state": [1]}, {"metrics": {"loss": "low"}}):
            # Rank 0's are saved, so rank 0's are looked at, and all learn what is wrong with them.
            with pytest.raises(SaveFailed, match=f"{next(iter(wrong))}"):
                ckpt.save(2, **wrong if rank() == 0 else {})
        run.step()
        ckpt.save(1, overwrite=True, metrics={"loss": torch.tensor(0.25)})


def test_a_published_step_is_refused_and_can_be_replaced(tmp_path: Path) -> None:
    run_ranks(2, refuse_existing, tmp_path)
    (entry,) = list_checkpoints(tmp_path, "checkpoint")
    assert (entry.step, dict(entry.metrics)) == (1, {"loss": 0.25})


def resume_nothing(run_dir: Path) -> bool:
    run = Run("fsdp", salt=0.5)
    before = run.digests()
    with run.checkpointer(run_dir) as ckpt:
        ckpt.save_hf(1)
        assert ckpt.resume() is None
    return run.digests() == before


def test_there_is_nothing_to_resume_from(tmp_path: Path) -> None:
    assert run_ranks(2, resume_nothing, tmp_path) == [True, True]


def fully_plain(run_dir: Path) -> None:
    """Any module, without a Hugging Face directory."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with stillframe.Checkpointer(run_dir, model=model, optimizer=optimizer, hf_export=False) as ckpt:
        ckpt.save(1)
        torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)  # adds an argument to the parameter group
        ckpt.save(2)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.zero_()
        resumed = ckpt.resume()
        assert resumed is not None
        assert resumed.step == 2
        with pytest.raises(stillframe.errors.UnsupportedModel, match="hf_export=False"):
            ckpt.save_hf(1)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_any_module_can_be_resumed(tmp_path: Path) -> None:
    run_process(fully_plain, tmp_path)
