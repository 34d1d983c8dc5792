"""A job that is told to end saves at the next boundary between steps, on all ranks alike, and goes on bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe.notice import PREEMPTED_STATUS, SIGNALS
from stillframe.testing import RankFailed, Ranks
from stillframe.train.hooks import Hook
from stillframe.train.loop import train
from tests.e2e.launch import Ended, alone, started, torchrun
from tests.e2e.training import DROPOUT, Sections, digests, events, losses, train_to_the_end
from tests.multirank.held_writers import wait_until
from tests.unit.train import material

STEPS = 6


def sections(**checkpoint: object) -> Sections:
    return {
        "model": {"config": DROPOUT},
        "training": {"total_steps": STEPS},
        "checkpoint": {"checkpoint_interval": -1} | checkpoint,
    }


class SignalTo(Hook):
    """After step `step` the ranks in `targets` get a signal, each its own of `numbers`."""

    def __init__(self, step: int, targets: dict[int, signal.Signals]) -> None:
        self._step = step
        self._targets = targets

    def after_train_step(self, step: int) -> None:
        number = self._targets.get(self.trainer.ranks.rank)
        if step == self._step and number is not None:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # an echo changes nothing


def train_preempted(work_dir: Path, run: Sections, hook: Hook) -> None:
    assert not train(material.config(work_dir, **run), [hook])


def names(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir() if path.is_dir() and not path.is_symlink()}


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        ({1: signal.SIGUSR1}, "checkpoint"),
        ({0: signal.SIGTERM, 1: signal.SIGTERM}, "snapshot"),
    ],
    ids=["one rank", "all ranks"],
)
def test_what_was_trained_is_saved_and_the_rest_is_the_same(
    tmp_path: Path, targets: dict[int, signal.Signals], kind: str
) -> None:
    run = sections() if kind == "checkpoint" else sections(snapshot_interval=5)
    with Ranks(2, train_preempted, tmp_path / "work", run, SignalTo(3, targets), timeout_s=120) as ranks:
        ranks.join()
    # A rank may be a step ahead when it learns of the signal, but all save the same step, and only that.
    (saved,) = names(tmp_path / "work/run")
    assert saved in (f"{kind}-3", f"{kind}-4")
    assert len(losses(tmp_path / "work/run")) == int(saved.partition("-")[2])
    train_to_the_end(tmp_path / "work", run, ranks=2)
    (resume,) = events(tmp_path / "work/run", "resume")
    assert resume["step"] == int(saved.partition("-")[2])
    train_to_the_end(tmp_path / "expected", run, ranks=2)
    assert losses(tmp_path / "work/run") == losses(tmp_path / "expected/run")
    last = f"hf-{STEPS}"
    assert digests(tmp_path / "work/run" / last) == digests(tmp_path / "expected/run" / last)


class Stuck(Hook):
    """The training thread does not come to the next step boundary."""

    def after_train_step(self, step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
            raise AssertionError("the process went on")


def test_a_process_that_does_not_come_to_its_save_within_the_budget_ends(tmp_path: Path) -> None:
    run = sections(checkpoint_interval=2, async_checkpoint=False, preemption_budget_s=0.5)
    with pytest.raises(RankFailed) as raised:
        train_alone(tmp_path, run, Stuck())
    assert f"ended with exit code {PREEMPTED_STATUS}" in str(raised.value)
    assert "SIGTERM came 0.5 s ago, and the process ends now: no save is in flight" in str(raised.value)
    assert names(tmp_path / "run") == {"checkpoint-2"}


def train_alone(work_dir: Path, run: Sections, hook: Hook) -> None:
    with Ranks(1, train_preempted, work_dir, run, hook, timeout_s=120) as ranks:
        ranks.join()


class Handled(Hook):
    """What the signals lead to before and after."""

    def __init__(self) -> None:
        self.during: list[object] = []

    def after_train_step(self, step: int) -> None:
        self.during = [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize(("preemption", "interval"), [(False, -1), (True, None)])
def test_handlers_are_put_back_and_left_alone_where_nothing_would_be_saved(
    tmp_path: Path, preemption: bool, interval: int | None
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    hook = Handled()
    checkpoint = {"preemption": preemption} | ({} if interval is None else {"checkpoint_interval": interval})
    assert train(material.config(tmp_path, training={"total_steps": 1}, checkpoint=checkpoint), [hook])
    assert hook.during == before
    assert [signal.getsignal(number) for number in SIGNALS] == before


# From the command line

CONFIG = """
run_dir = "run"

[model]
tokenizer = "tokenizer"
[model.config]
{model}

[data]
files = ["data.jsonl"]
seq_len = 32

[training]
total_steps = 1000000
device = "cpu"

[checkpoint]
checkpoint_interval = -1
"""

HOOKS = """
import os
import signal
from pathlib import Path

from stillframe.train.hooks import Hook


class SaysWhereItIs(Hook):
    def after_train_step(self, step):
        Path(f"trains-{self.trainer.ranks.rank}").touch()


class StopsItsWriter(Hook):
    def after_train_step(self, step):
        if step == 2:
            pid = self.trainer.checkpointer.writer_pid
            os.kill(pid, signal.SIGSTOP)
            Path("writer.txt").write_text(str(pid))
            Path("writer.txt").rename("writer")
"""


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """A folder with everything that a run needs."""
    material.table(tmp_path)
    model = "\n".join(f"{name} = {json.dumps(value)}" for name, value in DROPOUT.items())
    (tmp_path / "config.toml").write_text(CONFIG.format(model=model))
    (tmp_path / "user_hooks.py").write_text(HOOKS)
    return tmp_path


def preempted(command: list[str], hook: str, announced: list[Path], whom: Callable[[int], list[int]]) -> Ended:
    """A run that gets SIGTERM, in the processes `whom`, once what is `announced` is there; the first is `command`."""
    work_dir = announced[0].parent
    python_path = os.pathsep.join([str(work_dir), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [*command, "--set", f'hooks=["user_hooks:{hook}"]']
    with started(command, work_dir=work_dir, PYTHONPATH=python_path) as process:
        wait_until(lambda: all(path.exists() for path in announced) or process.poll() is not None, "it trained")
        for pid in whom(process.pid):
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGCONT)  # as SLURM sends it, for a process that was stopped
        stdout, stderr = process.communicate()  # bounded by the watchdog
        return Ended(process.returncode, stdout, stderr)


def saved(ended: Ended, work_dir: Path) -> int:
    """The step at which the run was preempted, which it has saved."""
    found = re.search(
        r"^preempted by SIGTERM on rank \d after step (\d+) of 1000000: (checkpoint-\1) is saved",
        ended.stdout,
        re.MULTILINE,
    )
    assert found is not None, ended
    assert (work_dir / "run" / found[2]).is_dir()
    return int(found[1])


def test_every_process_of_the_job_is_told_to_end_while_it_saves(work_dir: Path) -> None:
    """The writer, which is stopped in the middle, does its work nevertheless: that save, and the last one."""

    def all_of_them(pid: int) -> list[int]:
        return [int((work_dir / "writer").read_text()), pid]

    command = alone("train", "config.toml", "--set", "export.hf_interval=1")
    ended = preempted(command, "StopsItsWriter", [work_dir / "writer"], all_of_them)
    assert (ended.status, ended.stderr) == (PREEMPTED_STATUS, "")
    step = saved(ended, work_dir)
    exports = {f"hf-{exported}" for exported in range(1, step)}
    assert names(work_dir / "run") == exports | {f"checkpoint-{step}"}


def test_ranks_of_torchrun(work_dir: Path) -> None:
    announced = [work_dir / f"trains-{rank}" for rank in range(2)]
    ended = preempted(torchrun(2, "train", "config.toml"), "SaysWhereItIs", announced, lambda pid: [pid])
    assert ended.status == 1, ended  # torchrun's own, whatever its ranks end with
    saved(ended, work_dir)
    assert "forcefully exiting" not in ended.stderr
    assert "the process ends now" not in ended.stderr
