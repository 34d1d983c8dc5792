"""Bad input to a save: refused on every rank with one clear error, what is there untouched, and the next save works."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import stillframe
from stillframe.errors import (
    CheckpointExists,
    ClosedError,
    InsufficientSpace,
    OptionError,
    SaveFailed,
    SaveTimeout,
    StillframeError,
)
from stillframe.manifest import read_manifest
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_qwen3
from tests.multirank.exports import digests, distribute
from tests.multirank.footprint import listing

CHECKPOINT = ["config.json", "generation_config.json", "model.safetensors", "stillframe.json"]


@contextmanager
def expecting(cls: type[StillframeError], said: str) -> Iterator[None]:
    """In a rank: the exception of exactly this class, and words."""
    with pytest.raises(cls, match=said) as caught:
        yield
    assert type(caught.value) is cls


def open_checkpointer(run_dir: Path, **options: Any) -> stillframe.Checkpointer:
    model = distribute(tiny_qwen3(), "fsdp")
    return stillframe.Checkpointer(run_dir, model=model, **({"save_timeout_s": 60} | options))


def on_rank_0(action: Callable[[], object]) -> None:
    """Do something to the file system once, while all ranks wait."""
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def illegal_steps(run_dir: Path) -> None:
    with open_checkpointer(run_dir) as ckpt:
        for step in (-1, True, None, "5", 5.0, 10**18):
            for save in (ckpt.save_hf, ckpt.async_save_hf):
                with expecting(OptionError, r"step must be an integer from 0 to 10\^18 - 1, not"):
                    save(step)  # type: ignore[arg-type]
        assert listing(run_dir) == []
        dist.barrier()
        ckpt.save_hf(0)
        assert ckpt.save_hf(10**18 - 1) == run_dir / f"hf-{10**18 - 1}"


def test_illegal_steps_are_refused_at_the_call(tmp_path: Path) -> None:
    run_ranks(2, illegal_steps, tmp_path)


def step_that_exists(run_dir: Path) -> None:
    with open_checkpointer(run_dir) as ckpt:
        ckpt.save_hf(5)
        before = digests(run_dir / "hf-5")
        dist.barrier()
        for save in (ckpt.save_hf, ckpt.async_save_hf):
            with expecting(CheckpointExists, "save of step 5 failed .*/hf-5: it exists already; pass overwrite=True"):
                save(5)
        ckpt.check()  # it was raised; nothing is kept for later
        assert ckpt.in_flight is None
        assert digests(run_dir / "hf-5") == before
    # Nor in a later job.
    with open_checkpointer(run_dir) as ckpt:
        with expecting(CheckpointExists, "pass overwrite=True"):
            ckpt.async_save_hf(5)
        assert digests(run_dir / "hf-5") == before
        dist.barrier()
        ckpt.save_hf(5, overwrite=True)
        assert read_manifest(run_dir / "hf-5").sequence == 2


def test_a_step_that_exists_is_refused_at_the_call_and_untouched(tmp_path: Path) -> None:
    run_ranks(2, step_that_exists, tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["hf-5", "hf-latest", "run.json"]


def make_foreign(directory: Path) -> None:
    directory.mkdir()
    (directory / "mine.txt").write_text("mine")


def step_that_appeared(run_dir: Path) -> None:
    with open_checkpointer(run_dir) as ckpt:
        ckpt.save_hf(4)
        on_rank_0(lambda: make_foreign(run_dir / "hf-5"))
        before = digests(run_dir)
        for overwrite, said in ((False, "pass overwrite=True"), (True, "is not a checkpoint of stillframe .* move it")):
            future = ckpt.async_save_hf(5, overwrite=overwrite)
            with expecting(CheckpointExists, said):
                future.result(60)
            # Raised once more on the training thread, at the next call, and then no more.
            with expecting(CheckpointExists, said):
                ckpt.save_hf(6)
            ckpt.check()
            assert digests(run_dir) == before
        dist.barrier()
        ckpt.save_hf(6)


def test_a_directory_of_somebody_else_is_refused_on_every_rank_and_untouched(tmp_path: Path) -> None:
    run_ranks(2, step_that_appeared, tmp_path)
    assert listing(tmp_path / "hf-5") == ["mine.txt"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["hf-4", "hf-5", "hf-6", "hf-latest", "run.json"]


def lack_of_space(run_dir: Path) -> None:
    filler = run_dir / "filler"
    with open_checkpointer(run_dir, hf_max_keep=1) as ckpt:
        ckpt.save_hf(1)
        free = os.statvfs(run_dir).f_bavail * os.statvfs(run_dir).f_frsize
        on_rank_0(lambda: filler.write_bytes(bytes(free - 100_000)))
        before = digests(run_dir)
        said = r"save of step 2 failed on rank 0 .* \d{6} bytes are needed and \d{5} are free on the file system of"
        with expecting(InsufficientSpace, said):
            ckpt.save_hf(2)
        assert digests(run_dir) == before
        on_rank_0(filler.unlink)
        ckpt.save_hf(2)


def test_a_lack_of_space_is_found_before_anything_is_written(mount_tmpfs: Callable[[str], Path]) -> None:
    run_dir = mount_tmpfs("size=4m")
    run_ranks(2, lack_of_space, run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == ["hf-2", "hf-latest", "run.json"]
    assert listing(run_dir / "hf-2") == CHECKPOINT


def run_directory_lost(run_dir: Path) -> None:
    aside = run_dir.with_name("aside")
    with open_checkpointer(run_dir) as ckpt:
        ckpt.save_hf(1)
        dist.barrier()
        on_rank_0(lambda: run_dir.rename(aside))
        with expecting(SaveFailed, f"failed on rank 0 in stage 'prepare' .* No such file or directory: '{run_dir}"):
            ckpt.save_hf(2)
        on_rank_0(lambda: run_dir.write_text("mine"))
        with expecting(SaveFailed, r"failed on rank 0 in stage 'prepare' .*NotADirectoryError: [^;]*$"):
            ckpt.save_hf(2)
        on_rank_0(run_dir.unlink)
        on_rank_0(lambda: aside.rename(run_dir))
        ckpt.save_hf(2)


def test_a_run_directory_that_is_lost_fails_the_save_and_not_the_next_one(tmp_path: Path) -> None:
    run_ranks(2, run_directory_lost, tmp_path / "run")
    assert listing(tmp_path / "run/hf-2") == CHECKPOINT


def use_after_closing(run_dir: Path) -> None:
    ckpt = open_checkpointer(run_dir)
    ckpt.save_hf(1)
    ckpt.close()
    ckpt.close()
    for save in (ckpt.save_hf, ckpt.async_save_hf):
        with expecting(ClosedError, f"this Checkpointer of {run_dir} is closed"):
            save(2)
    assert ckpt.in_flight is None
    assert [report.step for report in ckpt.reports] == [1]


def test_a_closed_checkpointer_saves_no_more(tmp_path: Path) -> None:
    run_ranks(2, use_after_closing, tmp_path)
    assert listing(tmp_path / "hf-1") == CHECKPOINT


def different_steps(run_dir: Path) -> None:
    with open_checkpointer(run_dir) as ckpt:
        rank = dist.get_rank()
        with expecting(SaveFailed, "rank 1 saves step 11 while rank 0 saves step 10"):
            ckpt.save_hf(10 + rank)
        assert [name for name in listing(run_dir) if "incomplete" not in name] == []
        ckpt.save_hf(12)


def test_ranks_that_save_different_steps_all_learn_it_and_can_go_on(tmp_path: Path) -> None:
    run_ranks(2, different_steps, tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["hf-12", "hf-latest", "run.json"]


def save_without(run_dir: Path, absent: int) -> None:
    with open_checkpointer(run_dir, save_timeout_s=5) as ckpt:
        if dist.get_rank() != absent:
            said = "rank 1 did not report within 5 s" if absent == 1 else "rank 1 waited 5 s for rank 0 to create"
            with expecting(SaveTimeout, said):
                ckpt.save_hf(1)
        dist.barrier()
        assert listing(run_dir) == []
        dist.barrier()
        ckpt.save_hf(2)


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_does_not_call_is_named_and_can_join_the_next_save(tmp_path: Path, absent: int) -> None:
    run_ranks(2, save_without, tmp_path, absent)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["hf-2", "hf-latest", "run.json"]


def model_that_turns_bad(run_dir: Path) -> None:
    rank = dist.get_rank()
    model = tiny_qwen3(tied=False)
    head, norm, generation_config = (
        model.lm_head.weight,
        model.model.norm.weight,
        copy.deepcopy(model.generation_config),
    )
    with stillframe.Checkpointer(run_dir, model=model, save_timeout_s=60) as ckpt:
        ckpt.save_hf(1)
        if rank == 1:
            model.lm_head.weight = nn.Parameter(torch.empty_like(head, device="meta"))
        on_meta = r"step 2 failed on rank 1 .*/hf-2: UnsupportedModel: Qwen3ForCausalLM: 1 parameters .*lm_head\.weight"
        with expecting(SaveFailed, on_meta):
            ckpt.save_hf(2)
        # Here rank 0 has a new plan, and rank 1 none.
        model.model.norm.weight = nn.Parameter(model.model.norm.weight.bfloat16())
        with expecting(SaveFailed, on_meta):
            ckpt.save_hf(2)
        model.model.norm.weight = norm
        model.lm_head.weight = head
        model.generation_config.do_sample = False
        model.generation_config.temperature = 0.5
        with expecting(SaveFailed, "on rank 0 .*: UnsupportedModel: the config of Qwen3ForCausalLM cannot be saved: "):
            ckpt.save_hf(2)
        model.generation_config = generation_config
        if rank == 1:
            model.lm_head.weight = nn.Parameter(head.bfloat16())
        named = "" if rank == 1 else r"\? The first tensor that they describe differently: lm_head\.weight"
        other = "rank 1 has another layout than rank 0: do all ranks have the same model and options"
        with expecting(SaveFailed, other + named):
            ckpt.save_hf(2)
        model.lm_head.weight = head
        dist.barrier()
        assert [path.name for path in sorted(run_dir.iterdir())] == ["hf-1", "hf-latest", "run.json"]
        dist.barrier()
        ckpt.save_hf(2)


def test_a_model_that_turns_bad_on_one_rank_fails_the_save_on_all_until_it_is_good_again(tmp_path: Path) -> None:
    run_ranks(2, model_that_turns_bad, tmp_path)
    first, second = (digests(tmp_path / name) for name in ("hf-1", "hf-2"))
    assert first.pop("stillframe.json") != second.pop("stillframe.json")
    assert first == second


def cancel_a_save(run_dir: Path) -> bool:
    with open_checkpointer(run_dir) as ckpt:
        return ckpt.async_save_hf(1).cancel()


def test_a_save_cannot_be_cancelled_for_the_other_ranks_save_too(tmp_path: Path) -> None:
    assert run_ranks(2, cancel_a_save, tmp_path) == [False, False]
    assert listing(tmp_path / "hf-1") == CHECKPOINT
