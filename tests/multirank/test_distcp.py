"""What ranks write as a DCP directory is what stock torch reads, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import stillframe
from stillframe.layout.distcp import DistcpPlan, plan_distcp
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.copy import Snapshotter
from stillframe.testing import run_ranks
from stillframe.tree import StateTree
from tests.multirank.exports import build, distribute
from tests.multirank.test_parallelism import BY_HAND
from tests.state_trees import stepped, tree_of

MAX_FILE_BYTES = 300_000


def _fsdp() -> nn.Module:
    return distribute(build("qwen3", None), "fsdp")


def _ddp() -> nn.Module:
    return distribute(build("qwen3", None), "ddp")


CASES: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "fsdp": (3, _fsdp),  # uneven, tied weights
    "ddp": (2, _ddp),
    **{how: (4, make) for how, (_, make) in BY_HAND.items()},
}


def _save(directory: Path, how: str) -> tuple[str, int]:
    """Save one case; returns the digest and the bytes of this rank's share."""
    model = CASES[how][1]()
    tree = tree_of(model, stepped(model))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        (directory / "checkpoint").mkdir(parents=True)
        getattr(model, "module", model).config.save_pretrained(directory)
    dist.barrier()
    plan = plan_distcp(tree, rank=rank, world_size=world_size, plan_id=1, max_file_bytes=MAX_FILE_BYTES)
    _write(directory / "checkpoint", plan, tree)
    expected = _whole(tree)
    if rank == 0:
        torch.save(expected, directory / "expected.pt")
    return plan.layout.digest, sum(file.size_bytes for file in plan.share.plan.files)


def _write(directory: Path, plan: DistcpPlan, tree: StateTree) -> None:
    arena = Arena(plan.share.plan.arena_bytes)
    snapshotter = Snapshotter(plan.tensors, plan.share.copies, plan.share.envelopes, arena)
    snapshotter.lay_envelopes()
    snapshotter.copy()
    for file in plan.share.plan.files:
        with (directory / file.name).open("xb") as opened:
            for extent in file.extents:
                opened.seek(extent.file_offset)
                opened.write(memoryview(arena.bytes[extent.arena_offset :][: extent.length_bytes].numpy()))
    if plan.metadata is not None:
        for inline in plan.metadata.render(tree.objects):
            (directory / inline.name).write_bytes(inline.content)
    arena.close()


def _whole(tree: StateTree) -> dict[str, object]:
    """Every key with its whole value, flat."""
    whole = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in tree.tensors.items()}
    whole = {key: tensor.detach().clone() for key, tensor in whole.items()}
    return {**whole, **{alias: whole[key] for alias, key in tree.aliases.items()}, **tree.objects}


def _publish(directory: Path, how: str) -> None:
    """Save one case as users do: a checkpoint, and a checkpoint that is published together with an export."""
    model = CASES[how][1]()
    optimizer = stepped(model)
    options = {"model": model, "optimizer": optimizer, "publish_together": True}
    with stillframe.Checkpointer(directory / "run", **options) as ckpt:
        checkpoint = ckpt.save(1)
        together, _ = ckpt.save_both(2)
    expected = _whole(tree_of(model, optimizer))
    if dist.get_rank() == 0:
        for place in (checkpoint, together):
            reading = directory / place.parent.name if place == together else directory / place.name
            reading.mkdir()
            (reading / "checkpoint").symlink_to(place)
            torch.save(expected, reading / "expected.pt")
            getattr(model, "module", model).config.save_pretrained(reading)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[tuple[str, int]]]]:
    """A directory with every case saved in it, and what `_save` returned on each rank."""
    directory = tmp_path_factory.mktemp("distcp")
    return directory, {how: run_ranks(size, _save, directory / how, how) for how, (size, _) in CASES.items()}


def test_stock_torch_reads_model_and_optimizer(saved: tuple[Path, dict[str, list[tuple[str, int]]]]) -> None:
    directory, _ = saved
    _assert_read([directory / how for how in CASES])


def test_stock_torch_reads_what_is_published(tmp_path: Path) -> None:
    run_ranks(3, _publish, tmp_path, "fsdp")
    _assert_read([tmp_path / "checkpoint-1", tmp_path / "step-2"])


def _assert_read(directories: list[Path]) -> None:
    """Each is read by a process that cannot import stillframe."""
    program = Path(__file__).with_name("read_by_torch.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, program, *directories],
        capture_output=True,
        text=True,
        timeout=150,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert (finished.returncode, finished.stdout.splitlines()) == (0, [f"read {d.name}" for d in directories]), (
        finished.stderr
    )


@pytest.mark.parametrize("how", CASES)
def test_all_ranks_agree_and_write_all_there_is(how: str, saved: tuple[Path, dict[str, list[tuple[str, int]]]]) -> None:
    directory, returned = saved
    assert len({digest for digest, _ in returned[how]}) == 1
    sizes = [size for _, size in returned[how]]
    files = sorted((directory / how / "checkpoint").glob("*.distcp"))
    objects = max(path for path in files if path.name.startswith("__0_")).stat().st_size
    assert sum(sizes) + objects == sum(path.stat().st_size for path in files)
    if how == "ddp":
        assert max(sizes) / (sum(sizes) / len(sizes)) <= 1.05
    assert len(files) > len(sizes) + 1, "files end at the limit"
