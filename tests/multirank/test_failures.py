"""Failures of a save in the background: all or nothing on all ranks, told once on each, and the next one works."""

from __future__ import annotations

import gc
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import stillframe
from stillframe.errors import SaveFailed, StillframeError, WriteFailed, WriterDied
from stillframe.names import HISTORY_NAME
from stillframe.testing import Ranks, hold_at, reached, run_process, run_ranks
from stillframe.testing.models import tiny_qwen3
from tests.multirank.exports import digests, distribute
from tests.multirank.footprint import footprint, grown, listing
from tests.multirank.held_writers import asked, stopped, wait_until, wait_until_stopped, writer_pid
from tests.unit.commit.immutable import immutable

EXPORT = ["config.json", "generation_config.json", "model.safetensors", "stillframe.json"]
REPOSITORY_DIR = Path(__file__).parents[2]


def open_checkpointer(run_dir: Path, **options: Any) -> stillframe.Checkpointer:
    model = distribute(tiny_qwen3(), "fsdp")
    return stillframe.Checkpointer(run_dir, model=model, **({"save_timeout_s": 60} | options))


def expect_once(ckpt: stillframe.Checkpointer, cls: type[StillframeError], said: str) -> Exception:
    """The training thread hears of a failure at its next call, and then no more."""
    with pytest.raises(cls, match=said) as caught:
        ckpt.async_save_hf(99)
    assert type(caught.value) is cls
    ckpt.check()
    return caught.value


def names(run_dir: Path) -> list[str]:
    """What is in a run directory, but for its history."""
    return sorted({path.name for path in run_dir.iterdir()} - {HISTORY_NAME})


# Writers that die


def kill_idle_writer(run_dir: Path) -> None:
    with open_checkpointer(run_dir) as ckpt:
        ckpt.save_hf(1)
        pid = writer_pid(ckpt)
        if dist.get_rank() == 1:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: ckpt._frames is not None and not ckpt._frames.writer.alive, "the writer was gone")
        ckpt.save_hf(2)
        assert (writer_pid(ckpt) == pid) == (dist.get_rank() != 1)


def test_a_writer_that_died_between_two_saves_is_replaced(tmp_path: Path) -> None:
    run_ranks(2, kill_idle_writer, tmp_path)
    assert names(tmp_path) == ["hf-1", "hf-2", "hf-latest"]
    first, second = (digests(tmp_path / name) for name in ("hf-1", "hf-2"))
    del first["stillframe.json"], second["stillframe.json"]
    assert first == second


def kill_busy_writers(run_dir: Path, victims: tuple[int, ...]) -> list[int]:
    rank = dist.get_rank()
    with open_checkpointer(run_dir) as ckpt:
        ckpt.save_hf(1)
        before = digests(run_dir)
        pid = writer_pid(ckpt)
        dist.barrier()
        with stopped(pid):
            dist.barrier()
            future = ckpt.async_save_hf(2)
            wait_until(lambda: asked(ckpt), "the writer was asked")
            if rank in victims:
                os.kill(pid, signal.SIGKILL)
        error = future.exception(60)
        assert type(error) is WriterDied
        assert (error.step, error.rank, error.stage) == (2, victims[0], "write")
        assert error.path == run_dir / "hf-2"
        for victim in victims:
            assert f"rank {victim}" in str(error)
        assert "was killed by SIGKILL" in str(error)
        dist.barrier()
        assert digests(run_dir) == before  # neither a hidden directory nor anything else
        assert expect_once(ckpt, WriterDied, "was killed by SIGKILL") is error
        dist.barrier()
        ckpt.save_hf(3)
        return [report.step for report in ckpt.reports]


@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)])
def test_a_writer_that_dies_during_a_save_fails_it_on_all_ranks_and_is_replaced(
    tmp_path: Path, victims: tuple[int, ...]
) -> None:
    assert run_ranks(2, kill_busy_writers, tmp_path, victims) == [[1, 3], [1, 3]]
    assert names(tmp_path) == ["hf-1", "hf-3", "hf-latest"]
    assert listing(tmp_path / "hf-3") == EXPORT


# Disks that fill up, files that change


LAUNCHES: dict[str, Callable[[stillframe.Checkpointer], Future[Path]]] = {
    "hf": lambda ckpt: ckpt.async_save_hf(1),
    "checkpoint": lambda ckpt: ckpt.async_save(1),
    "step": lambda ckpt: ckpt.async_save_both(1)[0],
}


def fill_the_disk(run_dir: Path, kind: str) -> None:
    filler = run_dir / "filler"
    with open_checkpointer(run_dir, publish_together=True) as ckpt:
        ckpt.prepare(both=True)  # the writer cannot be told new plans while it is stopped
        with stopped(writer_pid(ckpt)):
            dist.barrier()
            future = LAUNCHES[kind](ckpt)
            wait_until(lambda: asked(ckpt), "the writer was asked")
            dist.barrier()
            if dist.get_rank() == 0:
                # There was room when it was looked for; now somebody else takes it.
                free = os.statvfs(run_dir).f_bavail * os.statvfs(run_dir).f_frsize
                filler.write_bytes(bytes(free - 100_000))
            dist.barrier()
        error = future.exception(60)
        assert type(error) is WriteFailed
        # Which of a rank's files is first to find no room depends on how far the other rank is.
        file = r"'(hf/|checkpoint/)?(model\.safetensors|__\d_0\.distcp|state/rank-\d{5}\.pt)'"
        assert re.search(
            rf"(allocating|writing) \d+ bytes .*{file} failed: No space left on device \(ENOSPC\)", str(error)
        )
        dist.barrier()
        assert names(run_dir) == ["filler"]
        dist.barrier()
        if dist.get_rank() == 0:
            filler.unlink()
        dist.barrier()
        expect_once(ckpt, WriteFailed, "ENOSPC")
        LAUNCHES[kind](ckpt).result()


@pytest.mark.parametrize(
    ("kind", "links"),
    [("hf", ["hf-latest"]), ("checkpoint", ["checkpoint-latest"]), ("step", ["checkpoint-latest", "hf-latest"])],
)
def test_a_disk_that_fills_up_while_it_is_written_fails_the_save_on_all_ranks(
    kind: str, links: list[str], mount_tmpfs: Callable[[str], Path]
) -> None:
    """Of two that are published together, neither is there; and the next save is whole."""
    run_dir = mount_tmpfs("size=4m")
    run_ranks(2, fill_the_disk, run_dir, kind)
    assert names(run_dir) == sorted([f"{kind}-1", *links])


def truncate_the_weights(hidden_dir: Path) -> None:
    os.truncate(hidden_dir / "model.safetensors", 1000)


def remove_the_config(hidden_dir: Path) -> None:
    (hidden_dir / ".stillframe/config.json").unlink()


def alter_a_receipt(hidden_dir: Path) -> None:
    receipt = hidden_dir / ".stillframe/receipt-00001.json"
    receipt.write_bytes(receipt.read_bytes().replace(b'"rank":1', b'"rank":7'))


def exchange_a_receipt(hidden_dir: Path) -> None:
    work_dir = hidden_dir / ".stillframe"
    (work_dir / "receipt-00001.json").write_bytes((work_dir / "receipt-00000.json").read_bytes())


def remove_a_receipt(hidden_dir: Path) -> None:
    (hidden_dir / ".stillframe/receipt-00001.json").unlink()


def remove_everything(hidden_dir: Path) -> None:
    shutil.rmtree(hidden_dir)


TAMPERING: list[tuple[Callable[[Path], None], str]] = [
    (truncate_the_weights, r"model\.safetensors: has 1000 bytes on disk, not \d+"),
    (remove_the_config, r"config\.json: was written, and is not there any more"),
    (alter_a_receipt, r"on rank 1 .* its receipt cannot be used: receipt was altered or torn"),
    (exchange_a_receipt, r"the receipt of rank 1 is of another attempt"),
    (remove_a_receipt, r"on rank 1 .* its receipt cannot be used: .*No such file or directory: .*receipt-00001\.json"),
    (remove_everything, r"its receipt cannot be used: .*No such file or directory"),
]


def hold_back_the_vote(run_dir: Path, saves: int) -> list[str]:
    """In each save rank 1 is stopped by the test while its writer writes, so that it votes when the test says."""
    errors = []
    with open_checkpointer(run_dir) as ckpt:
        for step in range(1, saves + 1):
            if dist.get_rank() == 1:
                os.kill(writer_pid(ckpt), signal.SIGSTOP)
                wait_until_stopped(writer_pid(ckpt))
            dist.barrier()
            future = ckpt.async_save_hf(step)
            if dist.get_rank() == 1:
                wait_until(lambda: asked(ckpt), "the writer was asked")
                (run_dir / "writer-pid").write_text(str(writer_pid(ckpt)))
                hold_at(f"writing {step}")
                (run_dir / "writer-pid").unlink()
            errors.append(str(future.exception(60)))
            expect_once(ckpt, SaveFailed, "published|publish|vote")
            dist.barrier()
            assert listing(run_dir) == []
            dist.barrier()
        ckpt.save_hf(saves + 1)
    return errors


def test_what_changes_between_writing_and_publishing_is_not_published(tmp_path: Path) -> None:
    with Ranks(2, hold_back_the_vote, tmp_path, len(TAMPERING)) as ranks:
        for step, (tamper, _) in enumerate(TAMPERING, start=1):
            ranks.wait_reached(f"writing {step}", rank=1)
            ranks.send_signal(1, signal.SIGSTOP)
            wait_until_stopped(ranks.pids[1])
            os.kill(int((tmp_path / "writer-pid").read_text()), signal.SIGCONT)
            hidden_dir = tmp_path / f".hf-{step}.incomplete"
            receipts = [hidden_dir / f".stillframe/receipt-{rank:05d}.json" for rank in (0, 1)]
            wait_until(lambda receipts=receipts: all(path.exists() for path in receipts), "both shares were written")
            tamper(hidden_dir)
            ranks.send_signal(1, signal.SIGCONT)
            ranks.release(1)
        errors = ranks.join()
    assert errors[0] == errors[1]
    for error, (_, said) in zip(errors[0], TAMPERING, strict=True):
        assert re.search(said, error), error
    assert names(tmp_path) == [f"hf-{len(TAMPERING) + 1}", "hf-latest"]


# What comes after publication


def link_that_cannot_be_made(run_dir: Path) -> None:
    in_the_way = run_dir / "hf-latest"
    with open_checkpointer(run_dir, hf_max_keep=1) as ckpt:
        if dist.get_rank() == 0:
            in_the_way.mkdir()
        dist.barrier()
        said = (
            r"save of step \d failed on rank 0 in stage 'link' .*: the checkpoint is published, but then: .*hf-latest"
        )
        for step in (1, 2):
            assert ckpt.async_save_hf(step).result(60) == run_dir / f"hf-{step}"
            assert expect_once(ckpt, SaveFailed, said).stage == "link"  # type: ignore[attr-defined]
        with pytest.raises(SaveFailed, match=said):
            ckpt.save_hf(3)
        ckpt.check()
        dist.barrier()
        # Nothing is removed as long as the link may still name it.
        assert names(run_dir) == ["hf-1", "hf-2", "hf-3", "hf-latest"]
        assert [report.step for report in ckpt.reports] == [1, 2, 3]
        dist.barrier()
        if dist.get_rank() == 0:
            in_the_way.rmdir()
        dist.barrier()
        ckpt.save_hf(4)


def test_a_link_that_cannot_be_made_is_told_and_the_checkpoint_is_published(tmp_path: Path) -> None:
    run_ranks(2, link_that_cannot_be_made, tmp_path)
    assert names(tmp_path) == ["hf-4", "hf-latest"]
    assert (tmp_path / "hf-latest").readlink() == Path("hf-4")


def old_one_that_stays(run_dir: Path) -> str | None:
    with open_checkpointer(run_dir, hf_max_keep=1) as ckpt:
        ckpt.save_hf(1)
        problem: list[str | None] = [None]
        with ExitStack() as stack:
            if dist.get_rank() == 0:
                try:
                    stack.enter_context(immutable(run_dir / "hf-1"))
                except OSError as error:
                    problem = [f"nothing can be made immutable here: {error}"]
            dist.broadcast_object_list(problem)
            if problem[0] is not None:
                return problem[0]
            said = "in stage 'retention' .*: the checkpoint is published, but then: .*Operation not permitted.*hf-1'"
            with pytest.raises(SaveFailed, match=said):
                ckpt.save_hf(2)
            dist.barrier()
            assert names(run_dir) == ["hf-1", "hf-2", "hf-latest"]
            dist.barrier()
        dist.barrier()
        ckpt.save_hf(3)
        return None


def test_an_old_checkpoint_that_cannot_be_removed_is_told_and_removed_when_it_can_be(tmp_path: Path) -> None:
    for problem in run_ranks(2, old_one_that_stays, tmp_path):
        if problem is not None:
            pytest.skip(problem)
    assert names(tmp_path) == ["hf-3", "hf-latest"]


# A rank 0 that says nothing


def stop_rank_0(run_dir: Path) -> None:
    with open_checkpointer(run_dir, save_timeout_s=1) as ckpt:
        ckpt.save_hf(1)
        if dist.get_rank() == 0:
            os.kill(writer_pid(ckpt), signal.SIGSTOP)
            wait_until_stopped(writer_pid(ckpt))
        dist.barrier()
        future = ckpt.async_save_hf(2)
        if dist.get_rank() == 0:
            wait_until(lambda: asked(ckpt), "the writer was asked")
            hold_at("writing")  # until the test kills this process
        error = future.exception(60)
        with pytest.raises(SaveFailed, match="cannot be reached"):
            ckpt.save_hf(3)
        with pytest.raises(SaveFailed, match="cannot be reached: the connection was given up"):
            ckpt.save_hf(3)
    (run_dir / "said").write_text(str(error))
    reached("told and closed")


def test_a_rank_0_that_is_stopped_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    with Ranks(2, stop_rank_0, tmp_path) as ranks:
        ranks.wait_reached("writing", rank=0)
        ranks.send_signal(0, signal.SIGSTOP)
        ranks.wait_reached("told and closed", rank=1)
    said = (tmp_path / "said").read_text()
    assert "rank 0's process, which holds the store, cannot be reached: no answer within" in said
    # Only a rank that has voted already cannot know.
    assert re.search(r"it is stopped, or its host cannot be reached( \(it may be published\))?$", said)


# The end of a training

SETUP = """
import os, signal, sys
from pathlib import Path
import stillframe
from stillframe.testing.models import tiny_qwen3
from tests.multirank.held_writers import asked, wait_until, wait_until_stopped, writer_pid

def stop_writer():
    os.kill(writer_pid(ckpt), signal.SIGSTOP)
    wait_until_stopped(writer_pid(ckpt))
    print(writer_pid(ckpt), flush=True)

def wait_until_asked():
    wait_until(lambda: asked(ckpt), "the writer was asked")

run_dir = Path(sys.argv[1])
ckpt = stillframe.Checkpointer(run_dir, model=tiny_qwen3())
"""


@dataclass(frozen=True)
class Ended:
    """How a training ended, what it said on standard error, and its writer, if that was told (a pidfd)."""

    status: int
    said: str
    writer_pidfd: int | None


@contextmanager
def training(code: str, run_dir: Path, log_path: Path) -> Iterator[Ended]:
    """Run a training in a process of its own, with SETUP and then `code`, to its end."""
    # Standard error is a file: a writer that outlives its trainer would keep a pipe open.
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SETUP + code, run_dir],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=REPOSITORY_DIR,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY_DIR), *filter(None, sys.path)])},
        )
    assert process.stdout is not None
    with process:
        writer_pid = process.stdout.readline()
        pidfd = os.pidfd_open(int(writer_pid)) if writer_pid else None
        try:
            status = process.wait(60)
            yield Ended(status, log_path.read_text(), pidfd)
        finally:
            process.kill()
            if pidfd is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)


def test_an_exception_ends_the_training_at_once_and_the_writer_finishes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    receipt = run_dir / ".hf-1.incomplete/.stillframe/receipt-00000.json"
    code = """
with ckpt:
    stop_writer()
    ckpt.async_save_hf(1)
    wait_until_asked()
    raise ValueError("loss is nan")
"""
    with training(code, run_dir, tmp_path / "log") as ended:
        assert ended.status == 1
        assert "ValueError: loss is nan" in ended.said
        assert not receipt.exists()
        assert ended.writer_pidfd is not None
        signal.pidfd_send_signal(ended.writer_pidfd, signal.SIGCONT)
        assert select.select([ended.writer_pidfd], [], [], 60)[0], "the writer did not end"
    # Everything is there but the publication.
    assert receipt.exists()
    assert names(run_dir) == [".hf-1.incomplete"]


def test_an_exception_ends_a_training_without_a_context_manager_too(tmp_path: Path) -> None:
    code = """
stop_writer()
ckpt.async_save_hf(1)
wait_until_asked()
raise ValueError("loss is nan")
"""
    with training(code, tmp_path / "run", tmp_path / "log") as ended:
        assert ended.status == 1
        assert "ValueError: loss is nan" in ended.said
        assert "ending on an exception: a save that may be in flight is not waited for" in ended.said


@pytest.mark.parametrize("end", ["", "sys.exit(0)"])
def test_a_training_that_ends_without_closing_still_publishes_its_last_save(tmp_path: Path, end: str) -> None:
    with training(f"ckpt.async_save_hf(1)\n{end}", tmp_path / "run", tmp_path / "log") as ended:
        assert ended.status == 0, ended.said
        assert "a Checkpointer was not closed before the interpreter ended; closing it now" in ended.said
    assert names(tmp_path / "run") == ["hf-1", "hf-latest"]


def live_on(run_dir: Path) -> dict[str, int]:
    model = tiny_qwen3()
    with stillframe.Checkpointer(run_dir, model=model):
        pass
    before = footprint()
    ckpt = stillframe.Checkpointer(run_dir, model=model)

    def train() -> None:
        with ckpt:
            ckpt.async_save_hf(1)
            raise ValueError("loss is nan")

    with pytest.raises(ValueError, match="loss is nan"):
        train()
    wait_until(lambda: not any("stillframe" in thread.name for thread in threading.enumerate()), "its threads ended")
    with pytest.raises(stillframe.errors.ClosedError):
        ckpt.save_hf(2)
    return grown(before)


def test_a_process_that_lives_on_after_an_exception_gets_everything_back(tmp_path: Path) -> None:
    assert run_process(live_on, tmp_path) == {}
    assert names(tmp_path) == ["hf-1", "hf-latest"]


def drop_it(run_dir: Path) -> dict[str, int]:
    model = tiny_qwen3()
    stillframe.Checkpointer(run_dir, model=model).close()
    before = footprint()
    ckpt = stillframe.Checkpointer(run_dir, model=model)
    ckpt.save_hf(1)
    pidfd = os.pidfd_open(writer_pid(ckpt))
    warnings.simplefilter("ignore", ResourceWarning)  # Python's own, and right: it should have been closed
    del ckpt
    gc.collect()
    assert select.select([pidfd], [], [], 60)[0], "the writer did not end"
    os.close(pidfd)
    left = grown(before)
    left.pop("child ", None)  # a process that has ended, and that nobody waits for
    return left


def test_a_checkpointer_that_is_dropped_without_closing_leaves_nothing_running(tmp_path: Path) -> None:
    assert run_process(drop_it, tmp_path) == {}
