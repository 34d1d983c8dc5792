"""Exports in bfloat16 of a model that trains in float32: what save_pretrained of the cast model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

import stillframe
from stillframe.testing import run_ranks
from tests.multirank.exports import build, companions, digests, distribute

SIZES = ("50KB", "50GB")


def _save(run_dir: Path, name: str, how: str, keep: tuple[str, ...]) -> None:
    model = distribute(build(name, None), how)
    for size in SIZES:
        with stillframe.Checkpointer(
            run_dir / size,
            model=model,
            max_shard_size=size,
            save_dtype=torch.bfloat16,
            keep_in_fp32=keep,
            **companions(name),
        ) as ckpt:
            ckpt.save_hf(3)
            ckpt.save_hf(4)


def _reference(name: str, kept: Any) -> PreTrainedModel:
    model = build(name, None)
    for parameter_name, parameter in model.named_parameters():
        if not kept(parameter_name):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen3_vl_moe"])
def test_a_cast_export_equals_the_save_of_the_cast_model(name: str, how: str, tmp_path: Path) -> None:
    run_ranks(3, _save, tmp_path / "run", name, how, ())
    for size in SIZES:
        _reference(name, lambda _: False).save_pretrained(tmp_path / size, max_shard_size=size)
        for companion in companions(name).values():
            companion.save_pretrained(tmp_path / size)
        for step in (3, 4):
            saved = digests(tmp_path / "run" / size / f"hf-{step}")
            assert saved.pop("stillframe.json")
            assert saved == digests(tmp_path / size)


def test_patterns_are_kept_in_float32_by_key_and_by_name(tmp_path: Path) -> None:
    # "experts.2.up" is in no runtime name: one of the keys of a fused tensor. "layernorm" is in both.
    run_ranks(2, _save, tmp_path / "run", "qwen3_moe", "fsdp", (r"experts\.2\.up", "layernorm"))
    whole = build("qwen3_moe", None)
    whole.save_pretrained(tmp_path / "whole")
    with (
        safe_open(tmp_path / "run" / "50GB" / "hf-4" / "model.safetensors", framework="pt") as saved,
        safe_open(tmp_path / "whole" / "model.safetensors", framework="pt") as expected,
    ):
        assert set(saved.keys()) == set(expected.keys())
        kept = {key for key in saved.keys() if saved.get_tensor(key).dtype == torch.float32}  # noqa: SIM118
        for key in saved.keys():  # noqa: SIM118
            value = expected.get_tensor(key)
            assert torch.equal(saved.get_tensor(key), value if key in kept else value.to(torch.bfloat16)), key
    layers = range(whole.config.num_hidden_layers)
    assert kept == {
        *(f"model.layers.{i}.mlp.experts.2.up_proj.weight" for i in layers),
        *(f"model.layers.{i}.{n}_layernorm.weight" for i in layers for n in ("input", "post_attention")),
    }


def test_buffers_and_modules_that_transformers_keeps_are_not_cast(tmp_path: Path) -> None:
    model = build("qwen3", None)
    model.register_buffer("statistics", torch.full((5,), 1 / 3))
    model._keep_in_fp32_modules_strict = {"k_norm"}
    with stillframe.Checkpointer(tmp_path, model=model, save_dtype="bfloat16") as ckpt:
        path = ckpt.save_hf(1)
    with safe_open(path / "model.safetensors", framework="pt") as saved:
        kept = {key for key in saved.keys() if saved.get_tensor(key).dtype == torch.float32}  # noqa: SIM118
    layers = range(model.config.num_hidden_layers)
    assert kept == {"statistics", *(f"model.layers.{i}.self_attn.k_norm.weight" for i in layers)}
