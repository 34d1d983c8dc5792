"""What stock `dcp.save` wrote on two ranks, loaded by ours on other numbers of ranks and other meshes, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from stillframe.errors import CorruptCheckpoint
from stillframe.load.distcp import open_distcp
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_batch, tiny_qwen3
from tests.multirank.test_load import local_of, shard_layers
from tests.multirank.test_parallelism import LINEARS
from tests.unit.load.distcp_directories import bits, flip, publish, read_metadata


def build(seed: int, tensor_parallel: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer that has made a step."""
    model = tiny_qwen3(seed=seed)
    if tensor_parallel > 1:
        sizes = (dist.get_world_size() // tensor_parallel, tensor_parallel)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("fsdp", "tp"))
        for layer in model.model.layers:
            parallelize_module(layer, mesh["tp"], {name: style() for name, style in LINEARS.items()})
            fully_shard(layer, mesh=mesh["fsdp"])
        fully_shard(model, mesh=mesh["fsdp"])
    else:
        shard_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed, weight_decay=0.1, foreach=False)
    model(**tiny_batch(model)).loss.backward()
    optimizer.step()
    return model, optimizer


def flat_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    flat, _ = flatten_state_dict({"model": model_state, "optimizer": optimizer_state})
    return dict(flat)


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def save_stock(directory: Path, expected_path: Path) -> None:
    model, optimizer = build(1, 1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)
    expected = {key: whole(value) for key, value in flat_state(model, optimizer).items()}
    if dist.get_rank() == 0:
        torch.save(expected, expected_path)


def load_ours(directory: Path, expected_path: Path, tensor_parallel: int) -> tuple[int, int]:
    """Bytes read, and bytes that the rank holds."""
    expected = torch.load(expected_path)
    state = flat_state(*build(2, tensor_parallel))
    targets = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    with open_distcp(directory) as opened:
        assert opened.objects == state.keys() - targets.keys()
        bytes_read = opened.fill(targets)
        for key in opened.objects:
            assert opened.object(key) == expected[key], key
        assert set(opened.paths) == set(state)
    for key, target in targets.items():
        found = whole(target)
        assert found.dtype == expected[key].dtype
        assert torch.equal(bits(found), bits(expected[key])), key
    return bytes_read, sum(local_of(target).nbytes for target in targets.values())


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("stock")
    run_ranks(2, save_stock, directory / "c", directory / "expected.pt")
    assert len({info.relative_path for info in read_metadata(directory / "c").storage_data.values()}) == 2
    return directory / "c", directory / "expected.pt"


@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(1, 1), (3, 1), (4, 2)])
def test_a_stock_checkpoint_is_loaded_onto_other_ranks_and_meshes(
    stock: tuple[Path, Path], world_size: int, tensor_parallel: int
) -> None:
    run_ranks(world_size, load_ours, *stock, tensor_parallel)


def test_with_a_manifest_it_is_checked_on_every_rank_that_needs_it(stock: tuple[Path, Path], tmp_path: Path) -> None:
    directory, expected_path = shutil.copytree(stock[0], tmp_path / "c"), stock[1]
    manifest = publish(directory)
    seen = run_ranks(4, load_ours, directory, expected_path, 1)
    assert all(bytes_read >= held for bytes_read, held in seen)
    name, entry = next((n, e) for n, e in manifest.tensors.items() if n.startswith("model.model.layers.0.mlp.up_proj"))
    flip(directory / entry.file, entry.offset + entry.size - 1)
    refusals = run_ranks(4, refusal, directory)
    # The chunk was one of two ranks', so two of four need a part of it, of which only one has the damaged byte.
    assert sum(text != "" for text in refusals) == 2
    for text in filter(None, refusals):
        assert entry.file in text
        assert name.partition("@")[0] in text


def refusal(directory: Path) -> str:
    state = flat_state(*build(2, 1))
    targets = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    try:
        with open_distcp(directory) as opened:
            opened.fill(targets)
    except CorruptCheckpoint as error:
        return str(error)
    return ""
