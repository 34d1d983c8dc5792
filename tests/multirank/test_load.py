"""`load_hf` on real ranks: each reads its own bytes only, and together they hold what was saved, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import stillframe
from stillframe.errors import CorruptCheckpoint, ModelMismatch
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_batch, tiny_qwen3, tiny_qwen3_moe, tiny_qwen3_vl_moe

MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen3 tied": tiny_qwen3,
    "qwen3_moe": tiny_qwen3_moe,
    "qwen3_vl_moe": tiny_qwen3_vl_moe,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one rank saw of a load: the bytes that it says it read, that it holds, and that the kernel counted."""

    bytes_read: int
    local_bytes: int
    counted_bytes: int


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def shard_layers(model: PreTrainedModel, **options: object) -> None:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module[0].__class__.__name__.endswith(("Layer", "Block")):
            for layer in module:
                fully_shard(layer, **options)
    fully_shard(model, **options)


def load_and_measure(directory: Path, model: nn.Module, **options: Any) -> Seen:
    # Loaded twice: what Python reads of its own modules at the first time is not counted.
    stillframe.load_hf(directory, model, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            local_of(parameter).zero_()
    before = _counted()
    report = stillframe.load_hf(directory, model, **options)
    counted = _counted() - before
    assert (report.missing, report.unexpected) == ((), ())
    return Seen(
        bytes_read=report.bytes_read,
        local_bytes=sum(local_of(parameter).nbytes for parameter in model.parameters()),
        counted_bytes=counted,
    )


def _counted() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def assert_holds(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Every tensor of the model, put together from all ranks, has the bits that it should."""
    found = dict(model.state_dict())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert whole.dtype == expected[name].dtype
        assert torch.equal(whole.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8)), name


def headers_bytes(directory: Path) -> int:
    """What every rank reads besides data: all headers, and the index."""
    total = sum(path.stat().st_size for path in directory.glob("*.json"))
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            total += 8 + int.from_bytes(file.read(8), "little")
    return total


def assert_read_own_bytes_only(seen: list[Seen], directory: Path, whole_bytes: int) -> None:
    for one in seen:
        assert one.bytes_read == one.local_bytes
        # Beside the data all headers, and /proc/self/io itself.
        assert one.bytes_read <= one.counted_bytes <= one.bytes_read + headers_bytes(directory) + 4096
    assert sum(one.bytes_read for one in seen) == whole_bytes


def load_sharded(directory: Path, name: str) -> Seen:
    model = MODELS[name](seed=2)
    shard_layers(model)
    seen = load_and_measure(directory, model)
    assert_holds(model, MODELS[name](seed=1).state_dict())
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_sharded_models_hold_what_was_saved_and_read_their_shards_only(
    name: str, world_size: int, tmp_path: Path
) -> None:
    saved = MODELS[name](seed=1)
    saved.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    seen = run_ranks(world_size, load_sharded, tmp_path, name)
    assert_read_own_bytes_only(seen, tmp_path, sum(parameter.nbytes for parameter in saved.parameters()))


def load_hub_layout(directory: Path) -> Seen:
    model = tiny_qwen3_vl_moe(seed=2)
    shard_layers(model)
    seen = load_and_measure(directory, model)
    assert_holds(model, tiny_qwen3_vl_moe(seed=1).state_dict())
    return seen


@pytest.mark.parametrize("world_size", [2, 3])
def test_transposed_experts_are_loaded_into_shards_of_whole_experts(world_size: int, tmp_path: Path) -> None:
    saved = tiny_qwen3_vl_moe(seed=1)
    save_hub_layout(saved, tmp_path)
    seen = run_ranks(world_size, load_hub_layout, tmp_path)
    assert_read_own_bytes_only(seen, tmp_path, sum(parameter.nbytes for parameter in saved.parameters()))


def save_hub_layout(model: PreTrainedModel, directory: Path) -> None:
    model.save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, path)


def load_gathered(directory: Path) -> None:
    """Parameters that a forward without a backward left gathered; and the next forward uses what was loaded."""
    model = tiny_qwen3_moe(seed=2).eval()
    shard_layers(model, reshard_after_forward=False)
    batch = tiny_batch(model)
    with torch.no_grad():
        model(**batch)
    assert not isinstance(model.lm_head.weight, DTensor), "gathered"
    stillframe.load_hf(directory, model)
    reference = tiny_qwen3_moe(seed=1).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, reference(**batch).logits)
    for module in model.modules():
        getattr(module, "reshard", lambda: None)()
    assert_holds(model, reference.state_dict())


def test_a_model_that_was_just_evaluated_is_loaded(tmp_path: Path) -> None:
    tiny_qwen3_moe(seed=1).save_pretrained(tmp_path)
    run_ranks(2, load_gathered, tmp_path)


def load_deferred(directory: Path, name: str) -> None:
    """A model that was sharded before it had memory, and trains after it was loaded."""
    expected = MODELS[name](seed=1)
    with torch.device("meta"):
        model = type(expected)(expected.config)
    shard_layers(model)
    with pytest.raises(stillframe.errors.UnsupportedModel, match="meta device"):
        stillframe.load_hf(directory, model)
    model.to_empty(device="cpu")
    model.tie_weights()
    seen = load_and_measure(directory, model)
    assert seen.bytes_read == seen.local_bytes
    model.init_weights()
    assert_holds(model, expected.state_dict())
    batch = tiny_batch(expected)
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss, expected(**batch).loss)
    loss.backward()


@pytest.mark.parametrize("name", ["qwen3 tied", "qwen3_moe"])
def test_a_model_sharded_on_the_meta_device_is_loaded_once_it_has_memory(name: str, tmp_path: Path) -> None:
    MODELS[name](seed=1).save_pretrained(tmp_path)
    run_ranks(2, load_deferred, tmp_path, name)


def load_into_bfloat16(directory: Path) -> None:
    model = tiny_qwen3_moe(seed=2, dtype=torch.bfloat16)
    shard_layers(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    stillframe.load_hf(directory, model)
    expected = tiny_qwen3_moe(seed=1).state_dict()
    assert_holds(model, {name: tensor.to(torch.bfloat16) for name, tensor in expected.items()})


def test_uneven_shards_of_another_dtype_are_cast(tmp_path: Path) -> None:
    tiny_qwen3_moe(seed=1).save_pretrained(tmp_path)
    run_ranks(3, load_into_bfloat16, tmp_path)


def load_replicated(directory: Path) -> Seen:
    model = DistributedDataParallel(tiny_qwen3(seed=2))
    seen = load_and_measure(directory, model)
    assert_holds(model.module, tiny_qwen3(seed=1).state_dict())
    assert torch.equal(model.module.lm_head.weight, model.module.model.embed_tokens.weight)
    return seen


def test_each_rank_of_a_replicated_model_reads_all_of_it(tmp_path: Path) -> None:
    saved = tiny_qwen3(seed=1)
    saved.save_pretrained(tmp_path)
    for seen in run_ranks(2, load_replicated, tmp_path):
        assert seen.bytes_read == seen.local_bytes == sum(parameter.nbytes for parameter in saved.parameters())


PLACEMENTS: dict[str, tuple[Placement, ...]] = {
    "replicas of shards": (Replicate(), Shard(0)),
    "both dimensions": (Shard(0), Shard(1)),
    "columns": (Replicate(), Shard(1)),
    "expert parallel under FSDP": (_StridedShard(0, split_factor=2), Shard(0)),
    "interleaved columns": (Shard(0), _StridedShard(1, split_factor=2)),
    "twice the same dimension": (Shard(0), Shard(0)),
}


def load_on_mesh(directory: Path, name: str, placements: tuple[Placement, ...]) -> Seen:
    """All matrices distributed by hand over a mesh of 2 x 2, vectors over its rows."""
    mesh = init_device_mesh("cpu", (2, 2))
    model = MODELS[name](seed=2)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            own = placements if parameter.dim() > 1 else (Shard(0), Replicate())
            setattr(module, key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, own)))
    model.tie_weights()
    seen = load_and_measure(directory, model)
    assert_holds(model, MODELS[name](seed=1).state_dict())
    return seen


@pytest.mark.parametrize("placements", PLACEMENTS)
def test_any_distribution_over_a_mesh_is_loaded(placements: str, tmp_path: Path) -> None:
    tiny_qwen3_moe(seed=1).save_pretrained(tmp_path)
    for seen in run_ranks(4, load_on_mesh, tmp_path, "qwen3_moe", PLACEMENTS[placements]):
        assert seen.bytes_read == seen.local_bytes


@pytest.mark.parametrize("placements", ["both dimensions", "expert parallel under FSDP"])
def test_any_distribution_of_transposed_experts_is_loaded(placements: str, tmp_path: Path) -> None:
    save_hub_layout(tiny_qwen3_vl_moe(seed=1), tmp_path)
    for seen in run_ranks(4, load_on_mesh, tmp_path, "qwen3_vl_moe", PLACEMENTS[placements]):
        assert seen.bytes_read >= seen.local_bytes, "a rank that holds part of a transposed matrix reads all of it"


def refuse_on_all_ranks(wrong_dir: Path, cut_dir: Path) -> None:
    model = tiny_qwen3_moe(seed=2)
    shard_layers(model)
    before = {name: local_of(tensor).clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelMismatch, match=r"1 tensors of the model are not in the files: model\.norm\.weight"):
        stillframe.load_hf(wrong_dir, model)
    with pytest.raises(CorruptCheckpoint, match="it is truncated"):
        stillframe.load_hf(cut_dir, model)
    dist.barrier()
    for name, tensor in model.state_dict().items():
        assert torch.equal(local_of(tensor), before[name])


def test_a_bad_directory_is_refused_on_every_rank_and_changes_nothing(tmp_path: Path) -> None:
    for name in ("wrong", "cut"):
        tiny_qwen3_moe(seed=1).save_pretrained(tmp_path / name)
    path = tmp_path / "wrong" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "model.norm.weight"}, path)
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run_ranks(2, refuse_on_all_ranks, tmp_path / "wrong", tmp_path / "cut")


def load_tied_apart(directory: Path) -> None:
    """Each rank compares its own part of a tied weight that is stored twice."""
    model = tiny_qwen3(seed=2)
    shard_layers(model)
    before = {name: local_of(tensor).clone() for name, tensor in model.state_dict().items()}
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        with pytest.raises(ModelMismatch, match="are one tensor in the model but have different values"):
            stillframe.load_hf(directory, model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(local_of(tensor), before[name])
    else:
        stillframe.load_hf(directory, model)


def test_a_tied_weight_stored_twice_is_compared_shard_by_shard(tmp_path: Path) -> None:
    tiny_qwen3(seed=1).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1  # of the last row, which the last rank holds
    save_file(tensors, path)
    run_ranks(2, load_tied_apart, tmp_path)
