"""SIGKILL of a trainer while the writers write: the others learn it in time, and nothing half is published.

A new job in the same run directory then saves the same step, whatever the writers of the killed one still do.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from awscrt.checksums import crc64nvme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import stillframe
from stillframe.errors import CheckpointExists, SaveFailed, SaveTimeout
from stillframe.manifest import read_manifest
from stillframe.names import HISTORY_NAME
from stillframe.testing import Ranks, hold_at, run_ranks
from stillframe.testing.models import tiny_qwen3
from tests.multirank.exports import digests, distribute, filled
from tests.multirank.held_writers import asked, wait_until, wait_until_stopped, writer_pid
from tests.unit.writer.held_file import HeldFile

VALUES_OF_KILLED, VALUES_OF_NEXT = 1.0, 2.0


def open_checkpointer(run_dir: Path, value: float, save_timeout_s: float = 60) -> stillframe.Checkpointer:
    model = distribute(tiny_qwen3(), "fsdp")
    filled(model, value)
    return stillframe.Checkpointer(run_dir, model=model, max_shard_size="50KB", save_timeout_s=save_timeout_s)


def save_and_be_killed(run_dir: Path, save_timeout_s: float) -> tuple[type[BaseException], str]:
    """Save 1, then begin 2, whose writers stand still until the test lets them go on; what a survivor is told."""
    with open_checkpointer(run_dir, VALUES_OF_KILLED, save_timeout_s) as ckpt:
        ckpt.save_hf(1)
        os.kill(writer_pid(ckpt), signal.SIGSTOP)
        wait_until_stopped(writer_pid(ckpt))
        (run_dir / f"writer-{dist.get_rank()}").write_text(str(writer_pid(ckpt)))
        dist.barrier()
        future = ckpt.async_save_hf(2)
        wait_until(lambda: asked(ckpt), "the writer was asked")
        hold_at("writing")
        error = future.exception(60)
        assert error is not None
        with pytest.raises(SaveFailed):
            ckpt.check()
        return type(error), str(error)


@contextmanager
def writers_of(run_dir: Path) -> Iterator[list[int]]:
    """pidfds of the writers of a job, by rank."""
    with ExitStack() as stack:
        pidfds = []
        for rank in (0, 1):
            pidfds.append(os.pidfd_open(int((run_dir / f"writer-{rank}").read_text())))
            stack.callback(os.close, pidfds[-1])
            (run_dir / f"writer-{rank}").unlink()
        yield pidfds


def save_again(run_dir: Path, is_recovered: bool) -> None:
    """A new job: what it finds of step 2 when it starts, and then its own save of that step."""
    with open_checkpointer(run_dir, VALUES_OF_NEXT) as ckpt:
        found = names(run_dir)
        assert found == ["hf-1", *["hf-2"] * is_recovered, "hf-latest"], found
        assert (run_dir / "hf-latest").readlink() == Path("hf-2" if is_recovered else "hf-1")
        if is_recovered:
            assert_as_published(run_dir / "hf-2")
            assert value_in(run_dir / "hf-2") == VALUES_OF_KILLED
            with pytest.raises(CheckpointExists):  # every rank knows it
                ckpt.save_hf(2)
        dist.barrier()
        ckpt.save_hf(2, overwrite=is_recovered)
        assert value_in(run_dir / "hf-2") == VALUES_OF_NEXT


def value_in(checkpoint_dir: Path) -> float:
    """What all of its weights are."""
    values = {
        value
        for path in checkpoint_dir.glob("*.safetensors")
        for tensor in load_file(path).values()
        for value in (tensor.min().item(), tensor.max().item())
    }
    (value,) = values
    return float(value)


def assert_as_published(checkpoint_dir: Path) -> None:
    """Every file is the one that the manifest speaks of, and there is no other."""
    files = read_manifest(checkpoint_dir).files
    assert {path.name for path in checkpoint_dir.iterdir()} == {*files, "stillframe.json"}
    for name, entry in files.items():
        assert f"{crc64nvme((checkpoint_dir / name).read_bytes()):016x}" == entry.crc64nvme, name


def names(run_dir: Path) -> list[str]:
    """What is in a directory, but for a run's history."""
    return sorted({path.name for path in run_dir.iterdir()} - {HISTORY_NAME})


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_learn_of_a_killed_trainer_and_nothing_half_is_published(tmp_path: Path, victim: int) -> None:
    survivor = 1 - victim
    with Ranks(2, save_and_be_killed, tmp_path, 3.0) as ranks:
        for rank in (0, 1):
            ranks.wait_reached("writing", rank=rank)
        before = digests(tmp_path / "hf-1")
        with writers_of(tmp_path) as writers:
            ranks.send_signal(victim, signal.SIGKILL)
            for writer in writers:
                signal.pidfd_send_signal(writer, signal.SIGCONT)
            ranks.release(survivor)
            outcomes = ranks.outcomes()
            for writer in writers:
                assert select.select([writer], [], [], 60)[0], "a writer outlived its work"
    killed, survived = outcomes[victim].failure, outcomes[survivor].value
    assert killed is not None
    assert killed.reason == "killed by SIGKILL"
    assert survived is not None, outcomes[survivor].failure
    cls, said = survived
    if victim == 0:
        assert cls is SaveFailed
        assert "rank 0's process, which holds the store, cannot be reached" in said
        # Nobody is left who could remove or publish it; it is not taken for a checkpoint.
        assert names(tmp_path) == [".hf-2.incomplete", "hf-1", "hf-latest"]
        # Neither by us, nor by a reader who is pointed at it: its weights have their full size from the start.
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            AutoModelForCausalLM.from_pretrained(tmp_path / ".hf-2.incomplete")
    else:
        assert cls is SaveTimeout
        assert "rank 1 did not report within 3 s" in said
        assert names(tmp_path) == ["hf-1", "hf-latest"]
    assert digests(tmp_path / "hf-1") == before
    assert (tmp_path / "hf-latest").readlink() == Path("hf-1")
    # Where nobody was left to remove it, the writers have left it whole.
    run_ranks(2, save_again, tmp_path, victim == 0)
    assert names(tmp_path) == ["hf-1", "hf-2", "hf-latest"]
    assert_as_published(tmp_path / "hf-2")


def begin_and_be_killed(run_dir: Path) -> None:
    save_and_be_killed(run_dir, 60.0)


def test_what_the_writers_of_a_killed_job_finish_the_next_job_publishes(tmp_path: Path) -> None:
    with Ranks(2, begin_and_be_killed, tmp_path) as ranks:
        for rank in (0, 1):
            ranks.wait_reached("writing", rank=rank)
        with writers_of(tmp_path) as writers:
            for rank in (0, 1):
                ranks.send_signal(rank, signal.SIGKILL)
            for writer in writers:
                signal.pidfd_send_signal(writer, signal.SIGCONT)
            for writer in writers:
                assert select.select([writer], [], [], 60)[0], "a writer outlived its work"
    assert len(list(tmp_path.glob(".hf-2.incomplete/.stillframe/receipt-*.json"))) == 2
    run_ranks(2, save_again, tmp_path, True)


def test_what_a_killed_writer_did_not_finish_the_next_job_removes(tmp_path: Path) -> None:
    with Ranks(2, begin_and_be_killed, tmp_path) as ranks:
        for rank in (0, 1):
            ranks.wait_reached("writing", rank=rank)
        with writers_of(tmp_path) as writers:
            for rank in (0, 1):
                ranks.send_signal(rank, signal.SIGKILL)
            signal.pidfd_send_signal(writers[1], signal.SIGKILL)
            signal.pidfd_send_signal(writers[0], signal.SIGCONT)
            for writer in writers:
                assert select.select([writer], [], [], 60)[0], "a writer outlived its work"
    assert len(list(tmp_path.glob(".hf-2.incomplete/.stillframe/receipt-*.json"))) == 1
    run_ranks(2, save_again, tmp_path, False)


@pytest.mark.parametrize("where", ["before their request", "between two files"])
def test_writers_of_a_killed_job_never_write_into_the_directory_of_the_next(tmp_path: Path, where: str) -> None:
    hidden_dir = tmp_path / ".hf-2.incomplete"
    with Ranks(2, save_and_be_killed, tmp_path, 60.0) as ranks:
        for rank in (0, 1):
            ranks.wait_reached("writing", rank=rank)
        last_file = max(path.name for path in (tmp_path / "hf-1").glob("*.safetensors"))
        with writers_of(tmp_path) as writers, ExitStack() as stack:
            held: HeldFile | None = None
            if where == "between two files":
                held = stack.enter_context(HeldFile(hidden_dir / last_file))
                for writer in writers:
                    signal.pidfd_send_signal(writer, signal.SIGCONT)
                held.wait_until_wanted()
                assert (hidden_dir / "generation_config.json").exists()
                assert not list(hidden_dir.glob(".stillframe/receipt-*"))
            for rank in (0, 1):
                ranks.send_signal(rank, signal.SIGKILL)
            run_ranks(2, save_again, tmp_path, False)
            assert names(tmp_path) == ["hf-1", "hf-2", "hf-latest"]
            assert_as_published(tmp_path / "hf-2")
            before = digests(tmp_path)
            if held is not None:
                held.release()
            for writer in writers:
                signal.pidfd_send_signal(writer, signal.SIGCONT)
            for writer in writers:
                assert select.select([writer], [], [], 60)[0], "a writer outlived its work"
        assert digests(tmp_path) == before
        assert names(tmp_path) == ["hf-1", "hf-2", "hf-latest"]


def save_beside_an_orphan(run_dir: Path) -> None:
    """Save 2 up to its hidden directory, hold there, then publish."""
    with open_checkpointer(run_dir, VALUES_OF_NEXT) as ckpt:
        os.kill(writer_pid(ckpt), signal.SIGSTOP)
        wait_until_stopped(writer_pid(ckpt))
        dist.barrier()
        future = ckpt.async_save_hf(2)
        wait_until(lambda: asked(ckpt), "the writer was asked")
        hold_at("prepared")
        os.kill(writer_pid(ckpt), signal.SIGCONT)
        future.result(60)


def test_an_orphan_that_wakes_up_while_the_next_job_writes_finds_the_directory_not_its_own(tmp_path: Path) -> None:
    with Ranks(2, save_and_be_killed, tmp_path, 60.0) as killed:
        for rank in (0, 1):
            killed.wait_reached("writing", rank=rank)
        with writers_of(tmp_path) as orphans:
            for rank in (0, 1):
                killed.send_signal(rank, signal.SIGKILL)
            with Ranks(2, save_beside_an_orphan, tmp_path) as following:
                for rank in (0, 1):
                    following.wait_reached("prepared", rank=rank)
                before = names(tmp_path / ".hf-2.incomplete")
                # Only now do the orphans read their request. The directory has the name that it tells them.
                for orphan in orphans:
                    signal.pidfd_send_signal(orphan, signal.SIGCONT)
                for orphan in orphans:
                    assert select.select([orphan], [], [], 60)[0], "an orphan outlived its work"
                assert names(tmp_path / ".hf-2.incomplete") == before == [".stillframe"]
                for rank in (0, 1):
                    following.release(rank)
                following.join()
    assert names(tmp_path) == ["hf-1", "hf-2", "hf-latest"]
    assert_as_published(tmp_path / "hf-2")
