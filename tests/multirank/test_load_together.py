"""`load_hf` with `broadcast`: of what ranks hold alike each reads a fair share, and gets the rest from the others."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import stillframe
from stillframe.errors import CorruptCheckpoint, LoadError, ModelMismatch
from stillframe.load import reading, replicas
from stillframe.testing import Ranks, run_ranks
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe, tiny_qwen3_vl_moe
from stillframe.wrappers import unwrapped_module
from tests.models.tiny_models import tiny_model
from tests.multirank.test_load import (
    Seen,
    assert_holds,
    headers_bytes,
    load_and_measure,
    save_hub_layout,
    shard_layers,
)

BUCKET_BYTES = 4096


def _small_buckets() -> None:
    replicas.BUCKET_BYTES, replicas._LEAST_BUCKET_BYTES = BUCKET_BYTES, 64


def _kimi(seed: int = 0) -> PreTrainedModel:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return tiny_model("kimi_k25", seed=seed)


def _ddp(model: PreTrainedModel) -> nn.Module:
    return DistributedDataParallel(model)


def _hsdp(model: PreTrainedModel) -> nn.Module:
    shard_layers(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return model


def _by_hand(model: PreTrainedModel) -> nn.Module:
    """Matrices cut along their columns by two ranks and held by two pairs of them, norms by all; in memory some of them
    are not in row-major order."""
    mesh = init_device_mesh("cpu", (2, 2))
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            own = (Replicate(), Shard(1)) if parameter.dim() == 2 else (Replicate(), Replicate())
            placed = distribute_tensor(parameter.detach(), mesh, own)
            if parameter.dim() == 2:
                placed._local_tensor = placed._local_tensor.t().contiguous().t()
            setattr(module, key, nn.Parameter(placed))
    model.tie_weights()
    return model


WAYS: dict[str, tuple[int, int, Callable[[PreTrainedModel], nn.Module], Callable[..., PreTrainedModel]]] = {
    # name: (ranks, how many of them hold the same, distributed how, which model)
    "ddp": (3, 3, _ddp, tiny_qwen3_moe),
    "hsdp": (4, 2, _hsdp, tiny_qwen3_moe),
    "by hand": (4, 2, _by_hand, tiny_qwen3),
}


def _load(directory: Path, way: str) -> Seen:
    _small_buckets()
    _, _, distributed, make = WAYS[way]
    model = distributed(make(seed=2))
    seen = load_and_measure(directory, model, broadcast=True)
    assert_holds(unwrapped_module(model), make(seed=1).state_dict())
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_each_rank_reads_its_share_of_what_it_holds_like_others(way: str, tmp_path: Path) -> None:
    world_size, replica_count, _, make = WAYS[way]
    saved = make(seed=1)
    saved.save_pretrained(tmp_path, max_shard_size="200KB")
    seen = run_ranks(world_size, _load, tmp_path, way)
    whole = sum(parameter.nbytes for parameter in saved.parameters())
    assert sum(one.bytes_read for one in seen) == whole
    for one in seen:
        # More ranks share what is small, such as norms. One may have two buckets more than another.
        assert one.bytes_read <= one.local_bytes / replica_count + 2 * BUCKET_BYTES
        assert one.bytes_read <= one.counted_bytes
        if way == "ddp":
            assert one.bytes_read >= one.local_bytes / replica_count - 2 * BUCKET_BYTES
            assert one.counted_bytes < whole / 2 + headers_bytes(tmp_path), "the kernel says so, too"


def _load_converted(kimi_dir: Path, hub_dir: Path) -> list[int]:
    _small_buckets()
    read = []
    for dtype in (torch.float32, torch.bfloat16):
        model = _kimi(seed=1).to(dtype)
        read.append(stillframe.load_hf(kimi_dir, _ddp(model), broadcast=True).bytes_read)
        expected = _kimi().from_pretrained(kimi_dir, dtype=dtype).state_dict()
        assert_holds(model, {name: tensor.to(dtype) for name, tensor in expected.items()})
    turned = tiny_qwen3_vl_moe(seed=2)
    stillframe.load_hf(hub_dir, _ddp(turned), broadcast=True)
    assert_holds(turned, tiny_qwen3_vl_moe(seed=1).state_dict())
    return read


def test_what_a_conversion_computes_one_rank_reads_and_computes_for_all(tmp_path: Path) -> None:
    """And transposed matrices may be cut."""
    _kimi().save_pretrained(tmp_path / "kimi")
    save_hub_layout(tiny_qwen3_vl_moe(seed=1), tmp_path / "hub")
    stored = load_file(tmp_path / "kimi" / "model.safetensors")
    whole = sum(tensor.nbytes for tensor in stored.values())
    # Values are stored together with what they are computed beside, and read once more for themselves.
    values = sum(tensor.nbytes for name, tensor in stored.items() if ".wqkv." in name) // 3
    for read in zip(*run_ranks(3, _load_converted, tmp_path / "kimi", tmp_path / "hub"), strict=True):
        assert sum(read) == whole + values
        assert max(read) < whole / 2


def _directories(tmp_path: Path, count: int) -> None:
    for rank in range(count):
        tiny_qwen3(seed=1).save_pretrained(tmp_path / str(rank))


def _refuse(root: Path) -> None:
    """Each rank loads a directory of its own. All know why it cannot be loaded, and their models are as they were."""
    rank = dist.get_rank()
    model = tiny_qwen3(seed=2)
    told = "" if rank == 1 else "rank 1: "
    with pytest.raises(CorruptCheckpoint, match=rf"^{told}/.*/cut/1/model\.safetensors: .*truncated"):
        stillframe.load_hf(root / "cut" / str(rank), model, broadcast=True)
    with pytest.raises(ModelMismatch, match=rf"^{told}/.*/less/1 .*not in the files: model\.norm\.weight"):
        stillframe.load_hf(root / "less" / str(rank), model, broadcast=True)
    other = tiny_qwen3(seed=2, dtype=torch.bfloat16) if rank == 2 else model
    with pytest.raises(LoadError, match=r"\(ranks 0, 1; rank 2\): their models differ, or their files"):
        stillframe.load_hf(root / "cut" / "0", other, broadcast=True)
    if rank == 0:
        with pytest.raises(LoadError, match="ranks 1, 2 did not say within 1 s"):
            stillframe.load_hf(root / "cut" / "0", model, broadcast=True, timeout_s=1)
    assert_holds(model, tiny_qwen3(seed=2).state_dict())


def test_what_one_rank_cannot_load_is_refused_on_all_and_changes_nothing(tmp_path: Path) -> None:
    for name in ("cut", "less"):
        _directories(tmp_path / name, 3)
    path = tmp_path / "cut" / "1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    path = tmp_path / "less" / "1" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "model.norm.weight"}, path)
    run_ranks(3, _refuse, tmp_path)


def _at_read(number: int, action: Callable[[], object]) -> None:
    """Do something just before the read of this number that this process makes of tensors' data from now on."""
    read, count = os.preadv, 0

    def counted(*args: Any) -> int:
        nonlocal count
        count += 1
        if count == number:
            action()
        return read(*args)

    reading.os.preadv = counted  # type: ignore[attr-defined]


def _read_what_is_cut_short(root: Path) -> str:
    """While all read, the file of rank 2, which has a copy of its own, becomes shorter."""
    _small_buckets()
    directory = root / str(dist.get_rank())
    if dist.get_rank() == 2:
        _at_read(4, lambda: os.truncate(directory / "model.safetensors", 30_000))
    model = _by_hand(tiny_qwen3(seed=2))
    with pytest.raises(CorruptCheckpoint) as caught:
        stillframe.load_hf(directory, model, broadcast=True)
    whole = stillframe.load_hf(root / "0", model, broadcast=True)
    assert (whole.missing, whole.unexpected) == ((), ())
    assert_holds(model, tiny_qwen3(seed=1).state_dict())
    return str(caught.value)


def test_an_error_while_one_rank_reads_is_raised_on_all_with_file_and_key(tmp_path: Path) -> None:
    _directories(tmp_path, 4)
    for rank, said in enumerate(run_ranks(4, _read_what_is_cut_short, tmp_path)):
        told = "" if rank == 2 else "rank 2: "
        reason = r"ended at byte \d+ \(of '[\w.]+'\) while it was being read"
        assert re.fullmatch(rf"{told}/.*/2/model\.safetensors: {reason}", said)


def _lose_a_rank(directory: Path) -> str:
    _small_buckets()
    if dist.get_rank() == 1:
        _at_read(4, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(LoadError) as caught:
        stillframe.load_hf(directory, tiny_qwen3(seed=2), broadcast=True)  # which waits for half an hour at most
    return str(caught.value)


def test_the_others_go_on_when_a_rank_is_killed_while_it_reads(tmp_path: Path) -> None:
    tiny_qwen3(seed=1).save_pretrained(tmp_path)
    with Ranks(3, _lose_a_rank, tmp_path) as ranks:
        first, killed, third = ranks.outcomes()
    assert killed.failure is not None
    assert first.failure is third.failure is None
    assert all(
        re.search(r"rank [02] could not (get|hand) tensors (from|to) rank \d", one)
        for one in (first.value, third.value)
    )


def _verify(run_dir: Path) -> None:
    _small_buckets()
    with stillframe.Checkpointer(run_dir, model=_ddp(tiny_qwen3(seed=1))) as ckpt:
        directory = ckpt.save_hf(1)
    model = tiny_qwen3(seed=2)
    stillframe.load_hf(directory, model, broadcast=True, verify=True)
    assert_holds(model, tiny_qwen3(seed=1).state_dict())
    dist.barrier()
    if dist.get_rank() == 0:
        path = directory / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[content.find(load_file(path)["model.norm.weight"].numpy().tobytes())] ^= 1
        path.write_bytes(content)
    dist.barrier()
    with pytest.raises(CorruptCheckpoint, match=r"1 tensors are not what was published: 'model\.norm\.weight'"):
        stillframe.load_hf(directory, model, broadcast=True, verify=True)


def test_damage_that_only_its_reader_looks_for_is_told_to_all(tmp_path: Path) -> None:
    run_ranks(2, _verify, tmp_path)
