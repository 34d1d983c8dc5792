"""Which saves a run makes when, what its hooks see of them, and what it writes down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillframe.errors import SaveFailed
from stillframe.train.hooks import Hook
from stillframe.train.loop import train
from tests.unit.train import material

Call = tuple[Any, ...]


class Recorder(Hook):
    """Notes every call about a save, and that it was there then."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.reached: list[int] = []

    def after_hf_export(self, path: Path, *at: int) -> None:
        self._note("hf", path, at, "model.safetensors")

    def after_checkpoint(self, path: Path, *at: int) -> None:
        self._note("checkpoint", path, at, ".metadata")

    def after_snapshot(self, path: Path, *at: int) -> None:
        self._note("snapshot", path, at, ".metadata")

    def _note(self, kind: str, path: Path, at: tuple[int, ...], needed: str) -> None:
        assert (path / needed).is_file()
        name = str(path.relative_to(self.trainer.run_dir))
        self.calls.append((kind, name, *at))
        self.reached.append(self.trainer.step)


def names(recorder: Recorder) -> list[str]:
    return [call[1] for call in recorder.calls]


@pytest.mark.parametrize(
    ("checkpoint", "made"),
    [
        ({}, ["hf-3", "hf-5"]),
        ({"checkpoint_interval": -1}, ["hf-3", "checkpoint-5", "hf-5"]),
        ({"checkpoint_interval": 2}, ["checkpoint-2", "hf-3", "checkpoint-4", "checkpoint-5", "hf-5"]),
        ({"snapshot_interval": 2}, ["snapshot-2", "hf-3", "snapshot-4", "hf-5"]),
        ({"snapshot_interval": 3}, ["snapshot-3", "hf-3", "hf-5"]),
        (
            {"checkpoint_interval": 2, "snapshot_interval": 1},
            [
                *("snapshot-1", "checkpoint-2", "snapshot-3", "hf-3", "checkpoint-4", "checkpoint-5", "hf-5"),
            ],
        ),
        (
            {"checkpoint_interval": 3, "publish_together": True},
            ["step-3/checkpoint", "step-3/hf", "step-5/checkpoint", "step-5/hf"],
        ),
    ],
)
def test_what_is_saved_when(tmp_path: Path, checkpoint: dict[str, Any], made: list[str]) -> None:
    recorder = Recorder()
    export = {"hf_interval": 3}
    train(material.config(tmp_path, export=export, checkpoint=checkpoint, training={"total_steps": 5}), [recorder])
    assert names(recorder) == made
    assert [call[1] for call in recorder.calls if f"-{call[2]}" not in call[1]] == []
    assert {call[3:] for call in recorder.calls} == {(1, 5, 1)}
    snapshots = [name for name in made if name.startswith("snapshot")]
    left = {name.split("/")[0] for name in made} - set(snapshots[:-1])
    found = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir() and not path.is_symlink()}
    assert found == left


@pytest.mark.parametrize("together", [False, True])
def test_what_is_not_asynchronous_is_delivered_before_the_next_step(tmp_path: Path, together: bool) -> None:
    recorder = Recorder()
    checkpoint = {"checkpoint_interval": 2, "snapshot_interval": 1, "publish_together": together}
    export = {"hf_interval": 1, "async_hf_export": False}
    sections = {"checkpoint": checkpoint | {"async_checkpoint": False}, "export": export}
    train(material.config(tmp_path, training={"total_steps": 3}, **sections), [recorder])
    steps = [step for _, _, step, *_ in recorder.calls]
    assert recorder.reached == steps == [1, 1, 2, 2, 3, 3]


def test_numbers_that_are_kept(tmp_path: Path) -> None:
    checkpoint = {"checkpoint_interval": 1, "checkpoint_maxkeep": 2}
    export = {"hf_interval": 1, "hf_max_keep": 3}
    train(material.config(tmp_path, checkpoint=checkpoint, export=export, training={"total_steps": 5}))
    found = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir() and not path.is_symlink()}
    assert found == {"checkpoint-4", "checkpoint-5", "hf-3", "hf-4", "hf-5"}


def test_every_save_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = {"checkpoint_interval": 2, "snapshot_interval": 3}
    train(material.config(tmp_path, checkpoint=checkpoint, training={"total_steps": 4}))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    saves = [event for event in map(json.loads, lines) if event["event"] != "step"]
    assert [(event["event"], event["step"], Path(event["path"]).name) for event in saves] == [
        ("checkpoint", 2, "checkpoint-2"),
        ("snapshot", 3, "snapshot-3"),
        ("checkpoint", 4, "checkpoint-4"),
        ("hf_export", 4, "hf-4"),
    ]
    for event in saves:
        assert event["staged_bytes"] > 0
        assert event["wait_s"] <= event["stall_s"] <= event["published_s"]
    printed = [line.split(" published:")[0] for line in capsys.readouterr().out.splitlines() if " published:" in line]
    assert printed == ["checkpoint-2", "snapshot-3", "checkpoint-4", "hf-4"]


def test_a_line_that_a_crash_cut_off_stays_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"event": "st')
    train(material.config(tmp_path, training={"total_steps": 1}))
    cut_off, *lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert cut_off == '{"event": "st'
    assert [json.loads(line)["event"] for line in lines] == ["step", "hf_export"]


def block(run_dir: Path, *names: str) -> None:
    """Make saves fail: their places are taken by something else."""
    for name in names:
        (run_dir / name).mkdir(parents=True)


def test_failures_are_borne_where_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    config = material.config(
        tmp_path,
        export={"hf_interval": 1, "on_failure": "continue", "max_failures": 2},
        checkpoint={"checkpoint_interval": 2},
        training={"total_steps": 4},
    )
    block(tmp_path / "run", "hf-1", "hf-2")
    train(config, [recorder])
    assert names(recorder) == ["checkpoint-2", "hf-3", "checkpoint-4", "hf-4"]
    said = [line for line in capsys.readouterr().out.splitlines() if "training goes on without" in line]
    assert [line.partition(": ")[0].split()[-1] for line in said] == ["hf-1", "hf-2"]
    assert all("it exists already" in line for line in said)


def test_one_failure_too_many_ends_the_training(tmp_path: Path) -> None:
    recorder = Recorder()
    config = material.config(
        tmp_path,
        export={"hf_interval": 1, "on_failure": "continue", "max_failures": 1},
        training={"total_steps": 4},
    )
    block(tmp_path / "run", "hf-1", "hf-2")
    with pytest.raises(SaveFailed, match="save of step 2 failed"):
        train(config, [recorder])
    assert names(recorder) == []
