"""Resuming: which checkpoint, what of it, and what is refused; the same on every rank."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torchdata.stateful_dataloader import StatefulDataLoader

import stillframe
from stillframe.catalog.directory import list_checkpoints
from stillframe.catalog.history import read_history
from stillframe.errors import (
    CheckpointExists,
    CorruptCheckpoint,
    LoadError,
    ModelMismatch,
    NotACheckpoint,
    OptionError,
)
from stillframe.policies import KeepBest, KeepEvery, KeepLast
from stillframe.testing import run_process, run_ranks
from stillframe.testing.models import tiny_qwen3
from tests.multirank.checkpoints import Run


def save_steps(run_dir: Path, steps: tuple[int, ...]) -> dict[int, dict[str, str]]:
    run = Run("fsdp")
    found = {}
    with run.checkpointer(run_dir) as ckpt:
        for step in range(1, max(steps) + 1):
            run.step()
            if step in steps:
                ckpt.save(step)
                found[step] = run.digests()
    return found


# What is damaged is named


def flip(directory: Path, key: str) -> None:
    """Change one bit of a tensor."""
    entry = next(e for n, e in manifest(directory)["tensors"].items() if n.startswith(f"{key}@"))
    with (directory / entry["file"]).open("r+b") as file:
        file.seek(entry["offset"] + entry["size"] // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))


def manifest(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "stillframe.json").read_text())
    return content


def truncate(directory: Path) -> None:
    path = directory / "__1_0.distcp"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)


def disagree(directory: Path) -> None:
    fields = manifest(directory)
    name = next(n for n in fields["tensors"] if n.startswith("model.model.norm.weight@"))
    fields["tensors"][name]["size"] += 4
    (directory / "stillframe.json").write_text(json.dumps(fields))


class Foreign:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never run",)


def foreign_class(directory: Path) -> None:
    content = pickle.dumps(Foreign())
    (directory / ".metadata").write_bytes(content)
    # As somebody would do it who can write there: the manifest agrees.
    from awscrt.checksums import crc64nvme

    fields = manifest(directory)
    fields["files"][".metadata"] = {"size": len(content), "crc64nvme": f"{crc64nvme(content):016x}"}
    (directory / "stillframe.json").write_text(json.dumps(fields))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped weight": (lambda d: flip(d, "model.model.norm.weight"), r"__\d_0\.distcp.*model\.model\.norm\.weight"),
    "flipped moment": (
        lambda d: flip(d, "optimizer.state.model.norm.weight.exp_avg"),
        r"distcp.*optimizer\.state\.model\.norm\.weight\.exp_avg",
    ),
    "truncated": (truncate, r"__1_0\.distcp is truncated: it has \d+ bytes, and was published with \d+"),
    "missing": (lambda d: (d / "__1_0.distcp").unlink(), r"__1_0\.distcp, which holds what rank 1 wrote, is missing"),
    "rank's state missing": (lambda d: (d / "state/rank-00001.pt").unlink(), r"state/rank-00001\.pt.* is missing"),
    "rank's state flipped": (
        lambda d: (d / "state/rank-00001.pt").write_bytes(bytes((d / "state/rank-00001.pt").stat().st_size)),
        r"state/rank-00001\.pt: was changed or damaged",
    ),
    "train state changed": (
        lambda d: (d / "train_state.json").write_text((d / "train_state.json").read_text().replace("3", "4")),
        r"train_state\.json: was changed or damaged",
    ),
    "manifest and files disagree": (disagree, r"model\.model\.norm\.weight"),
    "manifest torn": (lambda d: (d / "stillframe.json").write_text('{"format": "still'), "is not a valid manifest"),
    "metadata changed": (lambda d: (d / ".metadata").write_bytes(b"\x80\x02."), r"\.metadata"),
    "foreign class": (foreign_class, r"\.metadata.*print"),
}


def resume_damaged(run_dir: Path) -> tuple[str, int, dict[str, str], list[str]]:
    """The error, then what a resume that falls back comes to."""
    run = Run("fsdp", salt=0.5)
    with run.checkpointer(run_dir) as ckpt:
        with pytest.raises(LoadError) as caught:
            ckpt.resume()
        dist.barrier()
        resumed = ckpt.resume(fallback=True)
        assert resumed is not None
        assert (run_dir / "checkpoint-latest").readlink() == Path("checkpoint-2")
        found = run.digests()
        dist.barrier()
        # The damaged one's step can be saved again.
        run.step()
        ckpt.save(3)
        dist.barrier()
        names = sorted(path.name for path in run_dir.iterdir() if path.is_dir())
    assert resumed.step is not None
    return f"{type(caught.value).__name__}: {caught.value}", resumed.step, found, names


def test_what_is_damaged_is_named_on_every_rank_and_passed_over_when_told_to(tmp_path: Path) -> None:
    saved = run_ranks(2, save_steps, tmp_path / "good", (2, 3))[0]
    for name, (damage, message) in DAMAGES.items():
        run_dir = tmp_path / name
        shutil.copytree(tmp_path / "good", run_dir, symlinks=True)
        damage(run_dir / "checkpoint-3")
        for error, step, digests, names in run_ranks(2, resume_damaged, run_dir):
            assert error.startswith("CorruptCheckpoint"), f"{name}: {error}"
            assert str(run_dir / "checkpoint-3") in error
            import re

            assert re.search(message, error), f"{name}: {error}"
            assert (step, digests) == (2, saved[2])
            aside = [n for n in names if n.startswith("checkpoint-3.damaged-")]
            assert len(aside) == 1
            assert {"checkpoint-2", "checkpoint-3"} <= set(names)


def test_a_damaged_checkpoint_without_an_older_one_is_an_error_all_the_same(tmp_path: Path) -> None:
    run_ranks(2, save_steps, tmp_path, (1,))
    truncate(tmp_path / "checkpoint-1")
    for message in run_ranks(2, fall_back_to_nothing, tmp_path):
        assert "__1_0.distcp is truncated" in message


def fall_back_to_nothing(run_dir: Path) -> str:
    with Run("fsdp").checkpointer(run_dir) as ckpt, pytest.raises(CorruptCheckpoint) as caught:
        ckpt.resume(fallback=True)
    return str(caught.value)


# Other models, parts


def resume_another_model(run_dir: Path) -> str:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = tiny_qwen3().config
    config.num_hidden_layers = 4
    config.intermediate_size = 96
    config.layer_types = None
    model = Qwen3ForCausalLM(Qwen3Config(**{**config.to_dict(), "layer_types": None}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    with stillframe.Checkpointer(run_dir, model=model, optimizer=optimizer) as ckpt:
        with pytest.raises(ModelMismatch) as caught:
            ckpt.resume(fallback=True)  # the checkpoint is not damaged: nothing to fall back from
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not optimizer.state
    return str(caught.value)


def test_another_models_checkpoint_is_refused_with_all_differences(tmp_path: Path) -> None:
    run_process(save_alone, tmp_path)
    message = run_process(resume_another_model, tmp_path)
    assert "is the checkpoint of another model or optimizer, nothing was loaded" in message
    assert "tensors are not in the checkpoint: model.model.layers.3." in message
    assert "model.model.layers.0.mlp.gate_proj.weight has shape (80, 56) in the checkpoint, (96, 56) here" in message


def save_alone(run_dir: Path) -> None:
    run = Run("alone")
    run.step()
    with run.checkpointer(run_dir, stateful={"meter": Counter(5)}) as ckpt:
        ckpt.save(1, train_state={"epoch": 3})


class Counter:
    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def resume_in_parts(run_dir: Path) -> None:
    meter = Counter(0)
    run = Run("alone", salt=0.5, lr=7.0)
    with run.checkpointer(run_dir, stateful={"meter": meter}) as ckpt:
        ckpt.resume(skip=("optimizer", "scheduler", "rng", "meter"))
        assert not run.optimizer.state
        assert (meter.count, run.scheduler.last_epoch, run.position.at) == (0, 0, 1)
        ckpt.resume(skip="optimizer_arguments")
        assert run.optimizer.param_groups[0]["lr"] == 7.0
        assert run.optimizer.state
        assert (meter.count, run.scheduler.last_epoch) == (5, 1)
        with pytest.raises(OptionError, match="skip: there is no part 'optimiser'; parts are dataloader, meter"):
            ckpt.resume(skip=["optimiser"])
    # Without the meter it has no place, and without the scheduler there is nothing to put back.
    with stillframe.Checkpointer(run_dir, model=run.model, optimizer=run.optimizer) as ckpt:
        assert ckpt.resume() is not None
    with Run("alone").checkpointer(run_dir, stateful={"other": Counter(1)}) as ckpt:
        with pytest.raises(ModelMismatch, match=r"has no state of other; it was saved without. Pass skip=\('other',\)"):
            ckpt.resume()
        assert ckpt.resume(skip=["other"]) is not None


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    run_process(save_alone, tmp_path)
    run_process(resume_in_parts, tmp_path)


def frozen_left_out(run_dir: Path) -> None:
    run = Run("fsdp vl")
    run.step()
    with run.checkpointer(run_dir, save_frozen=False) as ckpt:
        ckpt.save(1)
        tensors = manifest(run_dir / "checkpoint-1")["tensors"]
        assert not any(".visual." in name for name in tensors)
        assert any(".language_model." in name for name in tensors)
        expected = run.digests()
        with torch.no_grad():
            for name, parameter in run.model.named_parameters():
                if ".visual." not in name:
                    parameter.zero_()
        ckpt.resume()
        assert run.digests() == expected
    with run.checkpointer(run_dir) as ckpt, pytest.raises(ModelMismatch, match=r"not in the checkpoint: .*\.visual\."):
        ckpt.resume()


def test_frozen_parameters_can_be_left_out(tmp_path: Path) -> None:
    run_ranks(2, frozen_left_out, tmp_path)


def real_dataloader(run_dir: Path) -> tuple[list[list[int]], list[list[int]]]:
    def loader() -> StatefulDataLoader[int]:
        generator = torch.Generator().manual_seed(dist.get_rank())
        return StatefulDataLoader(list(range(40)), batch_size=4, shuffle=True, generator=generator)

    model = tiny_qwen3()
    first = loader()
    batches = iter(first)
    for _ in range(3):
        next(batches)
    with stillframe.Checkpointer(run_dir, model=model, dataloader=first) as ckpt:
        ckpt.save(3)
    expected = [batch.tolist() for batch in batches]
    second = loader()
    with stillframe.Checkpointer(run_dir, model=model, dataloader=second) as ckpt:
        ckpt.resume()
    return expected, [batch.tolist() for batch in second]


def test_a_stateful_dataloader_goes_on_where_it_was(tmp_path: Path) -> None:
    both = run_ranks(2, real_dataloader, tmp_path)
    assert all(len(expected) == 7 and found == expected for expected, found in both)
    assert both[0] != both[1]


# Branches and retention


def branch_off(run_dir: Path) -> None:
    run = Run("fsdp")
    with run.checkpointer(run_dir, checkpoint_maxkeep=1) as ckpt:
        ckpt.resume(run_dir / "checkpoint-2")
        run.step()
        with pytest.raises(CheckpointExists, match="checkpoint-4"):
            ckpt.save(4)
        ckpt.save(3)
        ckpt.save(5)
        resumed = ckpt.resume()
        assert resumed is not None
        assert resumed.step == 5
    with run.checkpointer(run_dir, checkpoint_maxkeep=1) as ckpt:
        resumed = ckpt.resume()
        assert resumed is not None
        assert resumed.step == 5
        ckpt.save(6)


def test_an_older_checkpoint_starts_a_branch_that_leaves_the_old_one_alone(tmp_path: Path) -> None:
    run_ranks(2, save_steps, tmp_path, (1, 2, 4))
    run_ranks(2, branch_off, tmp_path)
    entries = list_checkpoints(tmp_path)
    assert [entry.step for entry in entries] == [1, 2, 4, 6]
    assert [entry.branch for entry in entries[:3]] == ["", "", ""]
    assert entries[3].branch != ""
    launches = read_history(tmp_path / "run.json").launches
    assert [launch.resumed_from for launch in launches] == [None, "checkpoint-5", "checkpoint-5"]
    assert [(launch.begin_step, launch.end_step) for launch in launches] == [(0, 4), (5, 5), (5, 6)]
    assert all(launch.ended_at is not None for launch in launches)


def keep_by_rules(run_dir: Path) -> None:
    run = Run("fsdp")
    run.step()
    rules = KeepLast(1) | KeepEvery(4) | KeepBest("loss")
    with run.checkpointer(run_dir, keep_checkpoints=rules, hf_max_keep=1) as ckpt:
        for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, float("nan"), 6.0], start=1):
            ckpt.save(step, metrics={"loss": loss})
            ckpt.save(step, snapshot=True)
            ckpt.save_hf(step)
    (run_dir / "run.json").unlink(missing_ok=True)
    with run.checkpointer(run_dir) as ckpt:
        resumed = ckpt.resume()
        assert resumed is not None
        assert (resumed.kind, resumed.step) == ("snapshot", 6)


def test_what_is_kept_is_what_the_rules_say(tmp_path: Path) -> None:
    run_ranks(2, keep_by_rules, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"checkpoint-2", "checkpoint-4", "checkpoint-6", "snapshot-6", "hf-6"} == {
        name for name in names if "latest" not in name and name != "run.json"
    }
    assert {link: str((tmp_path / f"{link}-latest").readlink()) for link in ("checkpoint", "snapshot", "hf")} == {
        "checkpoint": "checkpoint-6",
        "snapshot": "snapshot-6",
        "hf": "hf-6",
    }


# What stock torch wrote, and nothing that is not there


def resume_from_torch(run_dir: Path) -> bool:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    run = Run("fsdp moe")
    run.step(2)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=run_dir / "stock")
    expected = run.digests()
    other = Run("fsdp moe", salt=0.5, lr=3.0)
    with other.checkpointer(run_dir / "run") as ckpt:
        resumed = ckpt.resume(run_dir / "stock")
        assert resumed is not None
        assert (resumed.step, resumed.kind, resumed.train_state) == (None, None, {})
        assert resumed.left_as_they_are == ("dataloader", "rng", "scheduler")
        with pytest.raises(NotACheckpoint, match="nowhere: does not exist"):
            ckpt.resume(run_dir / "nowhere")
    return other.digests() == expected


def test_what_stock_torch_saved_is_resumed_from(tmp_path: Path) -> None:
    assert run_ranks(2, resume_from_torch, tmp_path) == [True, True]


# Costs


def steady_state(run_dir: Path) -> tuple[list[int], list[int], dict[Any, int], list[int]]:
    from torch.distributed.distributed_c10d import _world

    run = Run("fsdp moe")
    run.step()
    groups = [group for group in _world.pg_map if group is not None]

    def count() -> list[int]:
        return [group._get_sequence_number_for_group() for group in groups]

    with run.checkpointer(run_dir) as ckpt:
        ckpt.save(1)
        frames = ckpt._frames
        assert frames is not None
        plans = [frames._plans]
        before = count()
        with CommDebugMode() as on_this_thread:
            for step in (2, 3):
                run.optimizer.param_groups[0]["lr"] *= 0.5
                ckpt.save(step)
                ckpt.async_save_both(10 + step)[1].result()
        after = count()
        plans.append(frames._plans)
    return before, after, dict(on_this_thread.get_comm_counts()), plans


def test_a_save_plans_nothing_again_and_runs_no_collective(tmp_path: Path) -> None:
    for before, after, on_training_thread, (first, last) in run_ranks(2, steady_state, tmp_path):
        assert before == after
        assert on_training_thread == {}
        assert last - first == 2  # both of one step were planned once, when first asked for
