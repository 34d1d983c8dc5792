"""Real training processes that a test stops at a point of its choice, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from stillframe.testing import Ranks, hold_at
from stillframe.train.hooks import Hook
from stillframe.train.loop import train
from tests.multirank.held_writers import wait_until, wait_until_stopped
from tests.unit.train import material

Sections = dict[str, dict[str, Any]]

DROPOUT = material.QWEN3 | {"attention_dropout": 0.2}
"""A model that draws random numbers in every step, so that a random state that is not put back shows in the loss."""

SAVES = {"checkpoint_interval": 3, "snapshot_interval": 2}
HELD = "held"


class HoldAt(Hook):
    """Stand still after the training of `step`, before anything of it is saved, until the test kills the process."""

    def __init__(self, step: int) -> None:
        self._step = step

    def after_train_step(self, step: int) -> None:
        if step == self._step:
            hold_at(HELD)
            raise AssertionError("the process was to be killed here")


class HoldInSave(Hook):
    """Stop the writer before the save of `step` begins, and stand still one step later, with the save in flight.

    A save like it must have been made before: a new kind of save waits for the writer to know its plan.
    The process id of the writer, which has been asked for its share by then, is in `writer-<rank>` in `work_dir`.
    """

    def __init__(self, step: int, work_dir: Path) -> None:
        self._step = step
        self._work_dir = work_dir

    def after_train_step(self, step: int) -> None:
        checkpointer = self.trainer.checkpointer
        if step == self._step:
            wait_until(lambda: checkpointer.in_flight is None, "the save before it is over")
            os.kill(checkpointer.writer_pid, signal.SIGSTOP)
            wait_until_stopped(checkpointer.writer_pid)
            (self._work_dir / f"writer-{self.trainer.ranks.rank}").write_text(str(checkpointer.writer_pid))
        elif step == self._step + 1:

            def asked() -> bool:
                progress = checkpointer.in_flight
                return progress is not None and progress.step == self._step and progress.bytes_total > 0

            wait_until(asked, "the writer was asked")
            hold_at(HELD)
            raise AssertionError("the process was to be killed here")


def train_process(work_dir: Path, sections: Sections, hooks: list[Hook]) -> None:
    """One rank of a run; the same configuration is the same run."""
    train(material.config(work_dir, **sections), hooks)


def launch(work_dir: Path, sections: Sections, hooks: list[Hook], *, ranks: int) -> Ranks[None]:
    """On one rank without torch.distributed, as `stillframe train` alone; on several as under a launcher."""
    return Ranks(ranks, train_process, work_dir, sections, hooks, backend="gloo" if ranks > 1 else None, timeout_s=100)


def train_to_the_end(work_dir: Path, sections: Sections, *hooks: Hook, ranks: int) -> None:
    with launch(work_dir, sections, [*hooks], ranks=ranks) as launched:
        launched.join()


def train_and_kill(
    work_dir: Path, sections: Sections, *hooks: Hook, ranks: int, writers: signal.Signals | None = None
) -> None:
    """SIGKILL all ranks where one of `hooks` holds them, which they must have reached; then send `writers` to the
    writers that `HoldInSave` stopped. On return no process of the run is left."""
    with launch(work_dir, sections, [*hooks], ranks=ranks) as launched:
        for rank in range(ranks):
            launched.wait_reached(HELD, rank=rank)
        for rank in range(ranks):
            launched.send_signal(rank, signal.SIGKILL)
        if writers is not None:
            for rank in range(ranks):
                os.kill(int((work_dir / f"writer-{rank}").read_text()), writers)
        outcomes = launched.outcomes()
    assert [o.failure and o.failure.reason for o in outcomes] == ["killed by SIGKILL"] * ranks


def events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def losses(run_dir: Path) -> dict[int, set[tuple[float, float, float]]]:
    """Of each step, every loss, learning rate and gradient norm that was written of it: one, if all are the same."""
    found: dict[int, set[tuple[float, float, float]]] = {}
    for entry in events(run_dir, "step"):
        numbers = (entry["loss"], entry["learning_rate"], entry["grad_norm"])
        found.setdefault(entry["step"], set()).add(numbers)
    return found


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file below but stillframe's manifests, which say when they were written."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "stillframe.json"]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}
