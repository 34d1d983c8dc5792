"""Weights in fp8 with scales: their values, whatever the blocks; and what is refused, all of it at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import stillframe
from stillframe.errors import CorruptCheckpoint, ModelMismatch
from stillframe.layout.runs import Runs
from stillframe.load.dequantizing import find_quantized
from stillframe.load.directory import WEIGHTS_NAME, open_weights
from stillframe.load.folder import open_folder
from stillframe.load.reading import Reader
from stillframe.load.sources import Permutation, Source
from stillframe.testing.models import tiny_qwen3

FP8 = torch.float8_e4m3fn
CONFIG: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def write(directory: Path, tensors: Mapping[str, torch.Tensor], quantization: object) -> None:
    save_file(dict(tensors), directory / WEIGHTS_NAME)
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization}))


def made(shape: tuple[int, ...], block: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in fp8 and scales for it."""
    generator = torch.Generator().manual_seed(seed)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return torch.randn(shape, generator=generator).to(FP8), torch.rand(grid, generator=generator) + 0.5


def values(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    each = scales.float().repeat_interleave(block[0], -2)[..., : weight.shape[-2], :]
    return weight.float() * each.repeat_interleave(block[1], -1)[..., : weight.shape[-1]]


@settings(max_examples=25)
@given(data=st.data())
def test_any_runs_of_any_blocks(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("fp8")
    shape = tuple(data.draw(st.lists(st.integers(1, 11), min_size=2, max_size=3)))
    block = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    weight, scales = made(shape, block)
    write(directory, {"w": weight, "w_scale_inv": scales}, {**CONFIG, "weight_block_size": block})
    expected = values(weight, scales, block).flatten()
    cuts = sorted(data.draw(st.sets(st.integers(0, weight.numel()), min_size=2, max_size=6)) | {0})
    pieces = [(low, high - low) for low, high in zip(cuts[:-1:2], cuts[1::2], strict=False)]
    total = sum(length for _, length in pieces)
    rows, position = [], 0
    for low, length in data.draw(st.permutations(pieces)):
        rows.append((position, 0, low, length))
        position += length
    source = Source(key="w")
    if data.draw(st.booleans()):
        turned = torch.arange(weight.numel()).view(shape).transpose(-1, -2)
        source = Source(key="w", permutation=Permutation(offset=0, shape=turned.shape, stride=turned.stride()))
        expected = expected[turned.flatten()]
    flat = torch.zeros(total)
    with open_folder(directory) as place, open_weights(directory) as files:
        found = find_quantized(place, {t.name: t for f in files for t in f.tensors})
        reader = Reader(files, [source], scales=found.scales, bounce_bytes=data.draw(st.sampled_from([32, 1 << 20])))
        reader.fill(flat, Runs.of(rows))
    for start, _, low, length in rows:
        assert torch.equal(flat[start : start + length], expected[low : low + length])


def test_only_the_scales_that_are_needed_are_read(tmp_path: Path) -> None:
    weight, scales = made((1000, 300), (128, 128))
    write(tmp_path, {"w": weight, "w_scale_inv": scales}, CONFIG)
    with open_folder(tmp_path) as place, open_weights(tmp_path) as files:
        found = find_quantized(place, {t.name: t for f in files for t in f.tensors})
        reader = Reader(files, [Source(key="w")], scales=found.scales)
        flat = torch.zeros(600)
        reader.fill(flat, Runs.of([(0, 0, 127 * 300, 600)]))
    assert torch.equal(flat, values(weight, scales, (128, 128))[127:129].flatten())
    assert reader.bytes_read == 600 + 2 * 3 * 4


@pytest.fixture(scope="module")
def once_exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with stillframe.Checkpointer(tmp_path_factory.mktemp("run"), model=tiny_qwen3(), save_dtype="fp8") as ckpt:
        path = ckpt.save_hf(1)
    (path / "stillframe.json").unlink()  # it has the sizes of the files, which the tests change
    return path


@pytest.fixture
def path(once_exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once_exported, tmp_path / "exported"))


def test_everything_that_is_wrong_is_said_at_once(path: Path) -> None:
    tensors = load_file(path / WEIGHTS_NAME)
    layer = "model.layers.{}.self_attn.q_proj.weight"
    del tensors[layer.format(0) + "_scale_inv"]
    tensors[layer.format(1) + "_scale_inv"] = torch.ones(2, 1)
    tensors[layer.format(2) + "_scale_inv"] = torch.ones(1, 1, dtype=torch.int32)
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)
    save_file(tensors, path / WEIGHTS_NAME)
    model = tiny_qwen3(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelMismatch) as refused:
        stillframe.load_hf(path, model)
    message = str(refused.value)
    assert f"{layer.format(0)} is in fp8, but its scales, {layer.format(0)}_scale_inv, are not in the files" in message
    assert f"{layer.format(1)} is in fp8 and has shape (64, 56), for which scales of blocks of 128 x 128" in message
    assert "have shape (1, 1), not (2, 1)" in message
    assert f"{layer.format(2)} is in fp8, but its scales are torch.int32" in message
    assert "1 keys in the files are unknown to the model: model.norm.weight_scale_inv" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_scales_of_no_weight_are_allowed_where_unexpected_keys_are(path: Path) -> None:
    tensors = load_file(path / WEIGHTS_NAME)
    save_file({**tensors, "model.norm.weight_scale_inv": torch.ones(1)}, path / WEIGHTS_NAME)
    report = stillframe.load_hf(path, tiny_qwen3(seed=1), strict=False)
    assert report.unexpected == ("model.norm.weight_scale_inv",)


@pytest.mark.parametrize(
    "quantization",
    [None, {"quant_method": "fp8"}, {**CONFIG, "weight_block_size": [128, 0]}, {**CONFIG, "quant_method": "other"}],
)
def test_without_a_block_size_nothing_is_guessed(quantization: object, path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(ModelMismatch, match=r"q_proj\.weight is in fp8 with scales, but config\.json has no"):
        stillframe.load_hf(path, tiny_qwen3())
    (path / "config.json").unlink()
    with pytest.raises(ModelMismatch, match="so what each scale is for is not known"):
        stillframe.load_hf(path, tiny_qwen3())


def test_a_config_that_is_none_is_corrupt(path: Path) -> None:
    (path / "config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json: is not valid JSON"):
        stillframe.load_hf(path, tiny_qwen3())


def test_fp8_is_loaded_under_the_mapping_that_it_was_saved_with(path: Path, tmp_path: Path) -> None:
    mapping = {r"^model\.layers\.": "blocks."}
    with stillframe.Checkpointer(tmp_path, model=tiny_qwen3(), save_dtype="fp8", key_mapping=mapping) as ckpt:
        mapped = ckpt.save_hf(1)
    loaded, plain = tiny_qwen3(seed=1), tiny_qwen3(seed=1)
    stillframe.load_hf(mapped, loaded, key_mapping=mapping)
    stored = load_file(mapped / WEIGHTS_NAME)
    stillframe.load_hf(path, plain)
    assert "blocks.0.mlp.up_proj.weight_scale_inv" in stored
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in plain.state_dict().items())
    up = values(stored["blocks.0.mlp.up_proj.weight"], stored["blocks.0.mlp.up_proj.weight_scale_inv"], (128, 128))
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, up)
