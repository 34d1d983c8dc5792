"""What a start finds in a run directory, and what it makes of it; in one process, with runs that ended themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stillframe.errors import CorruptCheckpoint, LoadError, OptionError
from stillframe.train.config import TrainConfig
from stillframe.train.hooks import Hook
from stillframe.train.loop import train
from tests.unit.train import material

Sections = dict[str, dict[str, Any]]
CHECKPOINT = {"checkpoint_interval": 2}
SCHEDULE = {"min_lr_ratio": 0.0, "warmup_steps": 2}


def config(work_dir: Path, run: str, *, steps: int, **sections: dict[str, Any]) -> TrainConfig:
    """A run of that name. Its rate is constant unless `optimizer` says otherwise, so that it can be made longer."""
    sections = {"checkpoint": CHECKPOINT, "optimizer": {"min_lr_ratio": 1.0}} | sections
    sections["training"] = {"total_steps": steps} | sections.get("training", {})
    table = material.table(work_dir, **sections)
    return material.parse_config(table | {"run_dir": str(work_dir / run)}, source="test")


def events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def numbers(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(event["step"], event["loss"], event["learning_rate"]) for event in events(run_dir, "step")]


class Looks(Hook):
    """What the run is when it begins."""

    def connect(self, trainer: Any) -> None:
        super().connect(trainer)
        state = self.trainer.state()
        self.step = self.trainer.step
        self.state = state
        self.position = self.trainer.data.consumed_sequences
        self.random = torch.get_rng_state()
        self.moments = [s["exp_avg"].norm().item() for s in self.trainer.optimizer.state.values()]


def test_a_longer_run_goes_on_where_the_shorter_one_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path, "whole", steps=6))
    looks = Looks()
    train(config(tmp_path, "parts", steps=3))
    capsys.readouterr()
    train(config(tmp_path, "parts", steps=6), [looks])
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    state = looks.state
    assert (looks.step, state.step, state.epoch, state.consumed_samples, state.consumed_tokens) == (3, 3, 1, 3, 96)
    assert state.train_time_s > 0
    (resume,) = events(tmp_path / "parts", "resume")
    assert (resume["step"], resume["saved_world_size"], resume["begun_anew"]) == (3, 1, [])
    assert Path(resume["path"]).name == "checkpoint-3"
    printed = capsys.readouterr().out
    assert "resumed at step 3 from " in printed
    assert "the configuration changed: training.total_steps was 3, is 6\n" in printed


def test_a_run_that_is_complete_has_nothing_left_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path, "run", steps=2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*-2/*")}
    train(config(tmp_path, "run", steps=2))
    train(config(tmp_path, "run", steps=1))
    assert "step 2 of 1: nothing is left to train" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*-2/*")} == before
    assert len(numbers(tmp_path / "run")) == 2


def test_an_export_that_is_missing_is_made_up_for(tmp_path: Path) -> None:
    train(config(tmp_path, "run", steps=2))
    expected = (tmp_path / "run" / "hf-2" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "hf-2")
    train(config(tmp_path, "run", steps=2))
    assert (tmp_path / "run" / "hf-2" / "model.safetensors").read_bytes() == expected


def test_what_later_steps_left_is_replaced(tmp_path: Path) -> None:
    """As after a kill between two checkpoints, with exports in between."""
    train(config(tmp_path, "run", steps=6, export={"hf_interval": 1}))
    whole = numbers(tmp_path / "run")
    exported = {path: path.read_bytes() for path in (tmp_path / "run").glob("hf-*/model.safetensors")}
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    train(config(tmp_path, "run", steps=6, export={"hf_interval": 1}))
    assert numbers(tmp_path / "run") == whole + whole[2:]
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("hf-*/model.safetensors")} == exported
    assert [event["step"] for event in events(tmp_path / "run", "checkpoint")] == [2, 4, 6, 4, 6]


@pytest.mark.parametrize(
    ("checkpoint", "resume", "message"),
    [
        ({}, {}, "holds 1 checkpoints of an earlier run, hf-2 the latest, and none to resume from"),
        (CHECKPOINT, {"auto": False}, "holds 2 checkpoints .*, hf-2 the latest, and resume.auto is false"),
        ({}, {"from": "absent"}, "resume.from = 'absent': no such directory"),
    ],
)
def test_a_run_directory_that_is_not_resumed_is_refused(
    tmp_path: Path, checkpoint: dict[str, Any], resume: dict[str, Any], message: str
) -> None:
    train(config(tmp_path, "run", steps=2, checkpoint=checkpoint))
    with pytest.raises(OptionError, match=message):
        train(config(tmp_path, "run", steps=4, resume=resume))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"seq_len": 16}}, "position is one in other data: seq_len was 32, is 16"),
        ({"model": {"config": material.QWEN3 | {"intermediate_size": 64}}}, "mlp.*48.*64"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, sections: Sections, message: str) -> None:
    train(config(tmp_path, "run", steps=2))
    with pytest.raises(LoadError, match=message):
        train(config(tmp_path, "run", steps=4, **sections))


def test_a_checkpoint_that_the_trainer_did_not_write_is_refused(tmp_path: Path) -> None:
    class SavesItself(Hook):
        def after_train_step(self, step: int) -> None:
            self.trainer.checkpointer.save(step)

    train(config(tmp_path, "run", steps=1, checkpoint={}), [SavesItself()])
    with pytest.raises(LoadError, match=r"checkpoint-1: its train state has no epoch .* by another program"):
        train(config(tmp_path, "run", steps=2))


def test_parts_of_a_branch_begin_anew(tmp_path: Path) -> None:
    train(config(tmp_path, "old", steps=4, optimizer=SCHEDULE))
    origin = str(tmp_path / "old" / "checkpoint-4")

    def branch(name: str, **resume: bool) -> Looks:
        looks = Looks()
        sections = {"resume": {"from": origin} | resume, "optimizer": SCHEDULE}
        train(config(tmp_path, name, steps=8, **sections), [looks])
        return looks

    def rates(name: str) -> list[float]:
        return [rate for _, _, rate in numbers(tmp_path / name)]

    whole = branch("whole")
    assert whole.step == whole.position == 4
    assert all(whole.moments)
    anew = branch("anew", load_optimizer=False, load_schedule=False, load_dataset=False, load_rng=False)
    assert (anew.step, anew.position, anew.state.schedule_begin) == (4, 0, 4)
    assert anew.moments == []
    assert not torch.equal(anew.random, whole.random)
    assert events(tmp_path / "anew", "resume")[0]["begun_anew"] == ["dataloader", "optimizer", "rng", "schedule"]
    # Two steps of warm-up, then a cosine down to nothing: here over all eight steps, there over the last four.
    assert rates("whole")[-1] == rates("anew")[-1] == 0.0
    assert rates("anew")[:2] == pytest.approx([1.5e-3, 3e-3])
    assert rates("whole") == sorted(rates("whole"), reverse=True)

    # The run goes on with the schedule that it began, whatever it is told about what it branched from.
    shutil.rmtree(tmp_path / "anew" / "checkpoint-8")
    expected = rates("anew")
    train(config(tmp_path, "anew", steps=8, optimizer=SCHEDULE, resume={"from": origin, "load_schedule": False}))
    assert rates("anew") == expected + expected[2:]


def test_an_older_checkpoint_of_the_same_run_is_no_branch(tmp_path: Path) -> None:
    train(config(tmp_path, "run", steps=4))
    older, newest = (str(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4))
    with pytest.raises(OptionError, match=r"checkpoint-2': lies in this run_dir, which goes on from checkpoint-4\. To"):
        train(config(tmp_path, "run", steps=6, resume={"from": older}))
    train(config(tmp_path, "run", steps=6, resume={"from": newest}))
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [4]


def test_a_branch_may_begin_among_exports(tmp_path: Path) -> None:
    """As it does where it was stopped after its first export and before its first checkpoint."""
    train(config(tmp_path, "old", steps=2))
    resume = {"from": str(tmp_path / "old" / "checkpoint-2")}
    train(config(tmp_path, "new", steps=4, checkpoint={}, resume=resume))
    first = numbers(tmp_path / "new")
    train(config(tmp_path, "new", steps=4, resume=resume))
    assert numbers(tmp_path / "new") == first * 2


def flip_a_byte(checkpoint_dir: Path) -> Path:
    path = max(checkpoint_dir.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_checkpoint_is_named_and_passed_over_only_if_told_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config(tmp_path, "run", steps=4))
    whole = numbers(tmp_path / "run")
    damaged = flip_a_byte(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(CorruptCheckpoint, match=damaged.name):
        train(config(tmp_path, "run", steps=6))
    train(config(tmp_path, "run", steps=6, resume={"fallback": True}))
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [2]
    assert "checkpoint-4" in caplog.text
    assert numbers(tmp_path / "run")[:6] == whole + whole[2:]
    train(config(tmp_path, "run", steps=6))  # the damaged one was replaced on the way
