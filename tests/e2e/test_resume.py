"""A run that is killed and started again is the run that was never stopped: each loss, all it leaves, bit by bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from stillframe.train.hooks import Hook
from tests.e2e.training import (
    DROPOUT,
    SAVES,
    HoldAt,
    HoldInSave,
    Sections,
    digests,
    events,
    losses,
    train_and_kill,
    train_to_the_end,
)
from tests.unit.train import material

STEPS = 7
RUN: Sections = {
    "model": {"config": DROPOUT},
    "training": {"total_steps": STEPS},
    "checkpoint": SAVES,
    "export": {"hf_interval": 3},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run directory of a run that was never stopped, by number of ranks."""
    run_dirs = {}
    for ranks in (1, 2):
        work_dir = tmp_path_factory.mktemp(f"uninterrupted-{ranks}")
        train_to_the_end(work_dir, RUN, ranks=ranks)
        run_dirs[ranks] = work_dir / "run"
    return run_dirs


def assert_same_run(run_dir: Path, expected_dir: Path) -> None:
    """Every line that was ever written of a step, and all that is there at the end."""
    assert losses(run_dir) == losses(expected_dir)
    assert all(len(numbers) == 1 for numbers in losses(expected_dir).values())
    kept = {path.name for path in expected_dir.iterdir() if path.is_dir()}
    assert {path.name for path in run_dir.iterdir() if path.is_dir()} == kept
    for name in sorted(kept):
        actual, expected = digests(run_dir / name), digests(expected_dir / name)
        timed = {"train_state.json"} & expected.keys()  # it counts the time, too
        assert actual.keys() == expected.keys()
        assert {file for file in expected if actual[file] != expected[file]} == timed, name


def test_killed_at_every_step(tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    """One after the other, each start going on from what the one before had saved."""
    run = RUN | {
        "checkpoint": SAVES | {"async_checkpoint": False},
        "export": {"hf_interval": 3, "async_hf_export": False},
    }
    for step in range(1, STEPS + 1):
        train_and_kill(tmp_path, run, HoldAt(step), ranks=1)
    train_to_the_end(tmp_path, run, ranks=1)
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [2, 3, 4, 4, 6]
    assert_same_run(tmp_path / "run", uninterrupted[1])


def test_two_ranks_killed_with_saves_in_any_state(tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    for step in (3, 4, 7):
        train_and_kill(tmp_path, RUN, HoldAt(step), ranks=2)
    train_to_the_end(tmp_path, RUN, ranks=2)
    *_, of_third, of_last = [event["step"] for event in events(tmp_path / "run", "resume")]
    # The save before the last one was waited for; the last one the writers may have finished, or not.
    assert of_third in (2, 3)
    assert of_last in (4, 6)
    assert_same_run(tmp_path / "run", uninterrupted[2])


@pytest.mark.parametrize(
    ("writers", "resumed_at"),
    [(signal.SIGKILL, 4), (signal.SIGCONT, 6)],
    ids=["nothing of the save survives", "the writers finish it"],
)
def test_killed_in_the_middle_of_a_save(
    tmp_path: Path, uninterrupted: dict[int, Path], writers: signal.Signals, resumed_at: int
) -> None:
    # At step 6 an export is due too, which nobody wrote: the run that goes on from there makes up for it.
    train_and_kill(tmp_path, RUN, HoldInSave(6, tmp_path), ranks=2, writers=writers)
    train_to_the_end(tmp_path, RUN, ranks=2)
    (resume,) = events(tmp_path / "run", "resume")
    assert resume["step"] == resumed_at
    (recovered,) = resume["recovered"]
    action = "published" if resumed_at == 6 else "removed"
    assert recovered.startswith(f".checkpoint-6.incomplete is {action}: ")
    assert_same_run(tmp_path / "run", uninterrupted[2])


class NotesWhatIsRead(Hook):
    """Writes down the inputs of every forward pass, with the step that they belong to."""

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir

    def connect(self, trainer: object) -> None:
        super().connect(trainer)  # type: ignore[arg-type]
        self.trainer.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: object, args: object, kwargs: dict[str, object]) -> None:
        ids = kwargs["input_ids"].tolist()  # type: ignore[attr-defined]
        line = json.dumps([self.trainer.step + 1, ids])
        with (self._work_dir / f"read-{self.trainer.ranks.rank}.jsonl").open("a") as file:
            file.write(line + "\n")


def read_by_step(work_dir: Path) -> dict[int, list[list[int]]]:
    """The sequences that all ranks read in each step, sorted."""
    result: dict[int, list[list[int]]] = {}
    for path in work_dir.glob("read-*.jsonl"):
        for step, ids in map(json.loads, path.read_text().splitlines()):
            result[step] = sorted([*result.get(step, []), *ids])
    return result


def test_on_other_numbers_of_ranks_the_data_and_the_training_go_on(tmp_path: Path) -> None:
    plain: Sections = {
        "training": {"total_steps": 6, "micro_batch_size": 6},
        "checkpoint": {"checkpoint_interval": 2},
    }

    def on(ranks: int, total_steps: int) -> Sections:
        training = {"total_steps": total_steps, "micro_batch_size": 6 // ranks}
        # A constant rate, so that a run which ends early is the beginning of one that does not.
        return plain | {"training": training, "optimizer": {"min_lr_ratio": 1.0}}

    expected_dir, work_dir = tmp_path / "expected", tmp_path / "changing"
    for directory in (expected_dir, work_dir):
        directory.mkdir()
    train_to_the_end(expected_dir, on(1, 6), NotesWhatIsRead(expected_dir), ranks=1)
    for ranks, total_steps in [(2, 2), (3, 4), (2, 6)]:
        train_to_the_end(work_dir, on(ranks, total_steps), NotesWhatIsRead(work_dir), ranks=ranks)
    assert read_by_step(work_dir) == read_by_step(expected_dir)
    resumes = events(work_dir / "run", "resume")
    assert [(r["step"], r["saved_world_size"], r["world_size"], r["begun_anew"]) for r in resumes] == [
        (2, 2, 3, ["rng"]),
        (4, 3, 2, ["rng"]),
    ]
    assert [r["consumed_samples"] for r in resumes] == [12, 24]
    for step, ((expected, *_),) in losses(expected_dir / "run").items():
        ((actual, *_),) = losses(work_dir / "run")[step]
        assert actual == pytest.approx(expected, rel=1e-4)


def test_a_branch_from_an_older_checkpoint_leaves_the_run_alone(tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    before = digests(uninterrupted[1])
    branch = RUN | {
        "checkpoint": SAVES | {"async_checkpoint": False},  # so that the snapshot of step 4 is there at step 5
        "resume": {"from": str(uninterrupted[1] / "checkpoint-3")},
    }
    train_and_kill(tmp_path, branch, HoldAt(5), ranks=1)
    train_to_the_end(tmp_path, branch, ranks=1)  # goes on from its own snapshot of step 4
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [3, 4]
    assert digests(uninterrupted[1]) == before
    expected = losses(uninterrupted[1])
    assert losses(tmp_path / "run") == {step: expected[step] for step in range(4, STEPS + 1)}
    assert digests(tmp_path / "run" / f"hf-{STEPS}") == digests(uninterrupted[1] / f"hf-{STEPS}")


def test_material_differs_between_ranks(uninterrupted: dict[int, Path]) -> None:
    """The comparison above could not see exchanged random states if ranks drew alike."""
    states = [*(uninterrupted[2] / f"checkpoint-{STEPS}" / "state").iterdir()]
    assert len({path.read_bytes() for path in states}) == 2
    assert material.QWEN3["model_type"] == DROPOUT["model_type"]
