"""What a failed save leads to: raised, borne for so many in a row, or the end of the process; on every rank alike."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import stillframe
from stillframe.errors import SaveFailed
from stillframe.policies import ABORT_STATUS, OnFailure
from stillframe.testing import RankFailed, run_ranks
from stillframe.testing.models import tiny_qwen3
from tests.multirank.exports import distribute
from tests.multirank.footprint import footprint, grown, listing


def open_checkpointer(run_dir: Path, **options: Any) -> stillframe.Checkpointer:
    model = distribute(tiny_qwen3(), "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return stillframe.Checkpointer(run_dir, model=model, optimizer=optimizer, save_timeout_s=60, **options)


def block(run_dir: Path, kind: str, step: int) -> None:
    """Make the save of this step fail: its place is taken by something that stillframe did not put there."""
    if dist.get_rank() == 0:
        (run_dir / f"{kind}-{step}").mkdir()
    dist.barrier()


def fail(ckpt: stillframe.Checkpointer, run_dir: Path, kind: str, step: int) -> SaveFailed:
    block(run_dir, kind, step)
    future = ckpt.async_save_hf(step) if kind == "hf" else ckpt.async_save(step)
    error = future.exception(60)
    assert isinstance(error, SaveFailed)
    assert error.step == step
    return error


def bear(run_dir: Path) -> list[int]:
    with open_checkpointer(run_dir, on_failure=OnFailure("continue", at_most=2)) as ckpt:
        for steps in ((1, 2), (4, 5)):
            for step in steps:
                fail(ckpt, run_dir, "checkpoint", step)
                ckpt.check()  # borne
            fail(ckpt, run_dir, "hf", steps[0])  # counted apart
            ckpt.check()
            ckpt.save(steps[1] + 1)  # ends the row
        ckpt.save_hf(6)
        for step in (7, 8):
            fail(ckpt, run_dir, "checkpoint", step)
            ckpt.check()
        third = fail(ckpt, run_dir, "checkpoint", 9)
        with pytest.raises(SaveFailed) as raised:
            ckpt.async_save_hf(10)
        assert raised.value is third
        ckpt.check()  # raised once
        block(run_dir, "hf", 11)
        with pytest.raises(SaveFailed):
            ckpt.save_hf(11)  # who waits for a save is told in any case
        return [report.step for report in ckpt.reports]


def test_so_many_failures_in_a_row_are_borne_for_exports_and_checkpoints_apart(tmp_path: Path) -> None:
    assert run_ranks(2, bear, tmp_path) == [[3, 6, 6], [3, 6, 6]]


def two_policies(run_dir: Path, caplog_name: str) -> list[str]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger(caplog_name).addHandler(handler)
    with open_checkpointer(run_dir, on_export_failure="continue") as ckpt:
        fail(ckpt, run_dir, "hf", 1)
        ckpt.check()
        error = fail(ckpt, run_dir, "checkpoint", 2)
        with pytest.raises(SaveFailed) as raised:
            ckpt.check()
        assert raised.value is error
    return [record.getMessage() for record in records if record.levelno == logging.ERROR]


def test_exports_may_be_borne_where_checkpoints_are_not(tmp_path: Path) -> None:
    for messages in run_ranks(2, two_policies, tmp_path, "stillframe"):
        failed, goes_on, second = messages
        assert "save of step 1 failed" in failed
        assert goes_on == "training goes on without the hf of step 1: 1 in a row, of at most 3"
        assert "save of step 2 failed" in second


def abort(run_dir: Path) -> None:
    with open_checkpointer(run_dir, on_failure="abort") as ckpt:
        ckpt.save(1)
        (run_dir / f"ready-{dist.get_rank()}").touch()
        block(run_dir, "checkpoint", 2)
        ckpt.save(2)
        raise AssertionError("the process went on")


def test_abort_ends_every_rank_with_its_status_and_leaves_nothing(tmp_path: Path) -> None:
    before = footprint()
    with pytest.raises(RankFailed) as raised:
        run_ranks(2, abort, tmp_path)
    assert str(raised.value).count(f"ended with exit code {ABORT_STATUS}") == 2, str(raised.value)
    assert f"ending this process with status {ABORT_STATUS}, as on_failure='abort' says" in str(raised.value)
    assert {"ready-0", "ready-1", "checkpoint-1"} <= {path.name for path in tmp_path.iterdir()}
    assert listing(tmp_path / "checkpoint-2") == []
    assert listing(tmp_path / "checkpoint-1")
    assert grown(before) == {}
