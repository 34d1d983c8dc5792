"""A user's own loop under `stillframe.Preemption`: all ranks save and end at one step, whoever is signalled."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import stillframe
from stillframe.errors import ClosedError, OptionError, SaveTimeout
from stillframe.notice import SIGNALS
from stillframe.testing import Ranks, hold_at, reached, run_process, run_ranks
from stillframe.testing.models import tiny_qwen3
from tests.multirank.exports import distribute
from tests.multirank.footprint import footprint, grown
from tests.multirank.held_writers import wait_until

STEPS = 100_000
Signalled = dict[int, tuple[int, signal.Signals]]
"""Of ranks, the step in which they get a signal, and which."""
SIGNALLED: list[Signalled] = [
    {0: (1, signal.SIGTERM)},
    {2: (3, signal.SIGUSR1)},
    {0: (4, signal.SIGTERM), 1: (4, signal.SIGTERM), 2: (4, signal.SIGTERM)},
    {1: (2, signal.SIGUSR1), 0: (3, signal.SIGTERM)},
]


def open_checkpointer(run_dir: Path) -> stillframe.Checkpointer:
    model = tiny_qwen3()
    if dist.is_initialized():
        model = distribute(model, "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return stillframe.Checkpointer(run_dir, model=model, optimizer=optimizer, hf_export=False, save_timeout_s=60)


def assert_nothing_left(before: Mapping[str, int]) -> None:
    """Once all ranks have left: rank 0 holds the other ends of their connections until it sees that they are closed."""
    barrier()
    wait_until(lambda: grown(before) == {}, "nothing is left")
    barrier()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def footprint_of_all() -> Mapping[str, int]:
    """Before any of them goes on."""
    barrier()
    before = footprint()
    barrier()
    return before


def take_step(step: int, signalled: Signalled) -> None:
    """A step in which all ranks need each other. The signal comes in the middle of it, twice."""
    if dist.is_initialized():
        dist.all_reduce(torch.ones(1))
    rank = dist.get_rank() if dist.is_initialized() else 0
    at, number = signalled.get(rank, (None, None))
    if step == at and number is not None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)


def train(run_dir: Path, signalled: list[Signalled]) -> list[tuple[int, str | None]]:
    """Train until preempted, once for each of `signalled`; the last steps, and why."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    ended: list[tuple[int, str | None]] = []
    with open_checkpointer(run_dir) as ckpt:
        ckpt.save(0)  # what the first save starts stays
        before = footprint_of_all()
        for one in signalled:
            done = ended[-1][0] if ended else 0
            with stillframe.Preemption(ckpt, budget_s=100) as preemption:
                for step in range(done + 1, STEPS):
                    take_step(step - done, one)
                    if step == 5:
                        reached("training")
                    if preemption.due(step):
                        ckpt.async_save(step)
                        break
            assert ckpt.in_flight is None
            assert preemption.was_due
            ended.append((step, preemption.why))
            assert_nothing_left(before)
            assert [signal.getsignal(number) for number in SIGNALS] == handlers
    return ended


def checkpoints(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir() if path.is_dir() and not path.is_symlink()}


def test_all_ranks_save_one_step(tmp_path: Path) -> None:
    first, *others = run_ranks(3, train, tmp_path / "run", SIGNALLED)
    assert others == [first] * 2
    done = 0
    for (step, why), signalled in zip(first, SIGNALLED, strict=True):
        assert step - done >= min(at for at, _ in signalled.values())
        assert why in {f"{number.name} on rank {rank}" for rank, (_, number) in signalled.items()}
        done = step
    assert checkpoints(tmp_path / "run") == {"checkpoint-0"} | {f"checkpoint-{step}" for step, _ in first}


def test_a_signal_from_outside(tmp_path: Path) -> None:
    with Ranks(2, train, tmp_path / "run", [{}]) as ranks:
        for rank in range(2):
            ranks.wait_reached("training", rank=rank)
        ranks.send_signal(1, signal.SIGTERM)
        [(step, why)], other = ranks.join()
    assert other == [(step, why)]
    assert checkpoints(tmp_path / "run") == {"checkpoint-0", f"checkpoint-{step}"}
    assert why == "SIGTERM on rank 1"


def test_alone(tmp_path: Path) -> None:
    [(step, why)] = run_process(train, tmp_path / "run", [{0: (2, signal.SIGUSR1)}])
    assert step >= 2
    assert why == "SIGUSR1 on rank 0"
    assert checkpoints(tmp_path / "run") == {"checkpoint-0", f"checkpoint-{step}"}


def end_before(run_dir: Path, signalled: list[Signalled]) -> list[list[bool]]:
    """The step in which a signal comes is the last one."""
    answers = []
    with open_checkpointer(run_dir) as ckpt:
        before = footprint_of_all()
        for one in signalled:
            with stillframe.Preemption(ckpt) as preemption:
                due = []
                for step in (1, 2):
                    take_step(step, one)
                    due.append(preemption.due(step))
            assert preemption.was_due is due[-1]
            answers.append(due)
            assert_nothing_left(before)
    return answers


def test_a_training_that_ends_meanwhile_waits_for_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(2, end_before, tmp_path, [{}, {0: (2, signal.SIGTERM)}, {1: (2, signal.SIGUSR1)}])
    assert first == second
    assert first[0] == [False, False]


def pass_boundaries(ckpt: stillframe.Checkpointer) -> None:
    with ckpt, stillframe.Preemption(ckpt, budget_s=8) as preemption:
        hold_at("entered")
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        for step in range(1, 10**9):
            preemption.due(step)


def miss_a_rank(run_dir: Path) -> None:
    ckpt = open_checkpointer(run_dir)
    with pytest.raises(SaveTimeout, match=r"rank 2 did not say within 2 s how far") as raised:
        pass_boundaries(ckpt)
    assert (raised.value.rank, raised.value.stage) == (2, "preemption")
    reached("raised")
    hold_at("all raised")
    os._exit(7)  # an orderly end would wait for rank 2 in gloo


def test_a_dead_rank_is_named(tmp_path: Path) -> None:
    with Ranks(3, miss_a_rank, tmp_path) as ranks:
        for rank in range(3):
            ranks.wait_reached("entered", rank=rank)
        ranks.send_signal(2, signal.SIGKILL)
        for rank in range(2):
            ranks.release(rank)
        for rank in range(2):
            ranks.wait_reached("raised", rank=rank)


def fail(ckpt: stillframe.Checkpointer) -> None:
    with stillframe.Preemption(ckpt) as preemption:
        preemption.due(1)
        raise RuntimeError("training failed")


def fail_inside(run_dir: Path) -> None:
    ckpt = open_checkpointer(run_dir)
    before = footprint_of_all()
    with pytest.raises(RuntimeError, match="training failed"):
        fail(ckpt)
    assert_nothing_left(before)
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2
    ckpt.close()


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    run_ranks(2, fail_inside, tmp_path)


def misuse(run_dir: Path) -> None:
    ckpt = open_checkpointer(run_dir)
    before = footprint()
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            stillframe.Preemption(ckpt).__enter__()
        except OptionError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(60)
    assert len(errors) == 1
    del thread
    with pytest.raises(OptionError, match="budget_s"):
        stillframe.Preemption(ckpt, budget_s=-1)
    with pytest.raises(OptionError, match="signals is empty"):
        stillframe.Preemption(ckpt, signals=())
    assert grown(before) == {}
    ckpt.close()
    with pytest.raises(ClosedError):
        stillframe.Preemption(ckpt).__enter__()


def test_misuse_is_refused(tmp_path: Path) -> None:
    run_process(misuse, tmp_path)
