"""What a save promises while training goes on around it."""

from __future__ import annotations

import os
import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import stillframe
from stillframe.errors import CheckpointExists, ClosedError
from stillframe.manifest import read_manifest
from stillframe.testing import run_process, run_ranks
from stillframe.testing.models import tiny_batch, tiny_qwen3, tiny_qwen3_moe, tiny_tokenizer
from tests.multirank.exports import digests, distribute, filled


def _values(directory: Path) -> Counter[float]:
    """How often each value occurs in the weights of an export."""
    values: Counter[float] = Counter()
    for path in directory.glob("*.safetensors"):
        for tensor in load_file(path).values():
            found, counts = torch.unique(tensor, return_counts=True)
            values.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    return values


def _save_and_mutate(run_dir: Path, steps: int) -> None:
    model = distribute(tiny_qwen3_moe(), "fsdp")
    with stillframe.Checkpointer(run_dir, model=model, max_shard_size="50KB") as ckpt:
        for step in range(steps):
            filled(model, float(step))
            ckpt.async_save_hf(step)
            filled(model, -1.0)  # at once, while the save is in flight


@pytest.mark.parametrize("world_size", [1, 3])
def test_weights_changed_right_after_the_call_do_not_reach_the_file(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, _save_and_mutate, tmp_path, 5)
    for step in range(5):
        assert set(_values(tmp_path / f"hf-{step}")) == {float(step)}
    assert (tmp_path / "hf-latest").readlink() == Path("hf-4")


def _train_and_save(run_dir: Path) -> tuple[list[tuple[str, int, int]], dict[str, int]]:
    """Collectives on all process groups before and after saves, whichever thread ran them."""
    model = distribute(tiny_qwen3_moe(), "fsdp")
    model(**tiny_batch(model)).loss.backward()
    groups = [dist.group.WORLD, *{t.device_mesh.get_group() for t in model.parameters() if isinstance(t, DTensor)}]

    def count() -> list[int]:
        return [group._get_sequence_number_for_group() for group in groups if group is not None]

    with stillframe.Checkpointer(run_dir, model=model, tokenizer=tiny_tokenizer()) as ckpt:
        dist.barrier()
        before = count()
        with CommDebugMode() as on_this_thread:
            ckpt.save_hf(1)
            ckpt.async_save_hf(2).result()
        after = count()
        dist.barrier()
        names = [str(group) for group in groups]
        assert count() != after  # the counter does count: the barrier moved it
        return list(zip(names, before, after, strict=True)), dict(on_this_thread.get_comm_counts())


def test_a_save_runs_no_collective_on_any_thread(tmp_path: Path) -> None:
    for groups, on_training_thread in run_ranks(2, _train_and_save, tmp_path):
        assert groups
        assert all(before == after for _, before, after in groups)
        assert on_training_thread == {}


def _resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has no Pss")


def _memory_of_saves(run_dir: Path) -> tuple[list[int], list[int], int]:
    # 64 MiB of weights, so that one more copy of them would stand out of the noise.
    model = distribute(_wide_qwen3(), "fsdp")
    with stillframe.Checkpointer(run_dir, model=model, hf_max_keep=1) as ckpt:
        trainer, writer, descriptors = [], [], []
        for step in range(5):
            ckpt.save_hf(step)
            trainer.append(_resident_bytes(os.getpid()))
            writer.append(_resident_bytes(ckpt.writer_pid))
            descriptors.append(len([*Path("/proc/self/fd").iterdir()]))
        assert len(set(descriptors[1:])) == 1
        return trainer, writer, ckpt.reports[-1].staged_bytes


def _wide_qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def test_memory_is_flat_after_the_first_save(tmp_path: Path) -> None:
    for trainer, writer, staged_bytes in run_ranks(2, _memory_of_saves, tmp_path):
        assert staged_bytes > 30e6
        assert max(trainer[1:]) - trainer[0] < staged_bytes / 8
        assert max(writer[1:]) - writer[0] < staged_bytes / 8


def _save_with_umask(run_dir: Path, mask: int) -> None:
    os.umask(mask)
    model = distribute(tiny_qwen3_moe(), "fsdp")
    with stillframe.Checkpointer(run_dir, model=model, tokenizer=tiny_tokenizer(), max_shard_size="50KB") as ckpt:
        ckpt.save_hf(1)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    run_ranks(2, _save_with_umask, tmp_path / "run", mask)
    checkpoint = tmp_path / "run" / "hf-1"
    assert checkpoint.stat().st_mode & 0o777 == 0o777 & ~mask
    modes = {path.name: path.stat().st_mode & 0o777 for path in checkpoint.iterdir()}
    assert len(modes) > 10
    assert set(modes.values()) == {0o666 & ~mask}, modes


def _save_again(run_dir: Path, watch: Path) -> None:
    model = distribute(tiny_qwen3_moe(), "fsdp")
    with stillframe.Checkpointer(run_dir, model=model, max_shard_size="50KB") as ckpt:
        filled(model, 0.0)
        ckpt.save_hf(5)
        before = digests(run_dir / "hf-5")
        dist.barrier()
        with pytest.raises(CheckpointExists, match="overwrite=True"):
            ckpt.async_save_hf(5)
        with pytest.raises(CheckpointExists, match="hf-5"):
            ckpt.save_hf(5)
        assert digests(run_dir / "hf-5") == before
        dist.barrier()
        (watch / f"begun-{dist.get_rank()}").touch()
        for value in range(1, 20):
            filled(model, float(value))
            ckpt.save_hf(5, overwrite=True)
        (watch / f"ended-{dist.get_rank()}").touch()


def test_a_published_step_is_refused_or_replaced_in_one_step(tmp_path: Path) -> None:
    run_dir, watch = tmp_path / "run", tmp_path / "watch"
    watch.mkdir()
    seen: list[int] = []
    stop = threading.Event()
    problems: list[BaseException] = []

    def read_all_the_time() -> None:
        try:
            while not (watch / "begun-0").exists() and not stop.is_set():
                os.sched_yield()
            while not ((watch / "ended-0").exists() or stop.is_set()):
                # One descriptor, one version: what it opens stays whole although the name moves on.
                descriptor = os.open(run_dir / "hf-5", os.O_RDONLY | os.O_DIRECTORY)
                try:
                    # A version that was replaced meanwhile is being deleted; only the name promises wholeness.
                    names = {path.name for path in Path(f"/proc/self/fd/{descriptor}").iterdir()}
                    if (run_dir / "hf-5").stat().st_ino == os.fstat(descriptor).st_ino:
                        assert {"config.json", "model.safetensors.index.json", "stillframe.json"} <= names
                        seen.append(read_manifest(run_dir / "hf-5").sequence)
                finally:
                    os.close(descriptor)
        except BaseException as error:  # noqa: BLE001  # raised by the test itself
            problems.append(error)

    reader = threading.Thread(target=read_all_the_time)
    reader.start()
    try:
        run_ranks(2, _save_again, run_dir, watch)
    finally:
        stop.set()
        reader.join(timeout=30)
    assert not problems, problems
    assert seen == sorted(seen)
    assert len(set(seen)) > 1, "the reader saw replacements happen"
    assert set(_values(run_dir / "hf-5")) == {19.0}
    assert sorted(p.name for p in run_dir.iterdir()) == ["hf-5", "hf-latest", "run.json"]


def _without_distributed(run_dir: Path) -> tuple[Path, Path]:
    assert not dist.is_initialized()
    model = tiny_qwen3()
    ckpt = stillframe.Checkpointer(run_dir, model=model)
    future = ckpt.async_save_hf(1)
    assert isinstance(future, Future)
    paths = future.result(), ckpt.save_hf(2)
    assert digests(paths[0]).keys() == digests(paths[1]).keys()
    ckpt.close()
    ckpt.close()
    with pytest.raises(ClosedError):
        ckpt.save_hf(3)
    return paths


def test_works_without_torch_distributed(tmp_path: Path) -> None:
    assert run_process(_without_distributed, tmp_path) == (tmp_path / "hf-1", tmp_path / "hf-2")
    first, second = digests(tmp_path / "hf-1"), digests(tmp_path / "hf-2")
    del first["stillframe.json"], second["stillframe.json"]
    assert first == second  # synchronous and asynchronous saves are the same bytes


def _save_after_evaluation(run_dir: Path) -> None:
    """A forward without a backward leaves FSDP's root parameters gathered; the snapshot must not mind."""
    model = distribute(tiny_qwen3_moe(), "fsdp")
    with stillframe.Checkpointer(run_dir, model=model) as ckpt:
        ckpt.save_hf(1)
        with torch.no_grad():
            model(**tiny_batch(model))
        assert not all(isinstance(p, DTensor) for p in model.parameters())
        ckpt.save_hf(2)


def test_saving_after_an_evaluation_forward(tmp_path: Path) -> None:
    run_ranks(2, _save_after_evaluation, tmp_path)
    first, second = digests(tmp_path / "hf-1"), digests(tmp_path / "hf-2")
    del first["stillframe.json"], second["stillframe.json"]
    assert first == second


def _save_changed_models(run_dir: Path) -> None:
    model = tiny_qwen3(tied=False)
    with stillframe.Checkpointer(run_dir, model=model) as ckpt:
        ckpt.save_hf(1)
        for parameter in model.parameters():
            parameter.data = parameter.data + 1.0  # the memory moves, the parameters stay
        ckpt.save_hf(2)
        model.save_pretrained(run_dir / "reference-2")
        model.lm_head = nn.Linear(56, 388, bias=True)  # another layout
        ckpt.save_hf(3)
        model.save_pretrained(run_dir / "reference-3")
        model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()  # not row-major any more
        ckpt.save_hf(4)
        model.model.norm.weight.data.mul_(2)
        model.lm_head.weight.data.mul_(2)
        ckpt.save_hf(5)
        model.save_pretrained(run_dir / "reference-5")


def test_models_whose_tensors_move_or_change_between_saves(tmp_path: Path) -> None:
    run_process(_save_changed_models, tmp_path)
    weights = {n: digests(tmp_path / f"hf-{n}")["model.safetensors"] for n in (1, 2, 3, 4, 5)}
    assert weights[3] == weights[4]
    assert len(set(weights.values())) == 4
    for n in (2, 3, 5):
        assert weights[n] == digests(tmp_path / f"reference-{n}")["model.safetensors"]


def _keep_two(run_dir: Path) -> None:
    model = distribute(tiny_qwen3(), "ddp")
    with stillframe.Checkpointer(run_dir, model=model, hf_max_keep=2) as ckpt:
        for step in (10, 20, 30):
            ckpt.async_save_hf(step)
        assert ckpt.in_flight is None or ckpt.in_flight.step == 30
    assert [report.step for report in ckpt.reports] == [10, 20, 30]
    assert all(0 < r.stall_s <= r.written_s <= r.published_s for r in ckpt.reports)


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    (tmp_path / "hf-5").mkdir()  # not ours: no manifest
    run_ranks(2, _keep_two, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf-20", "hf-30", "hf-5", "hf-latest", "run.json"]
