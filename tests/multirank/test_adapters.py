"""Exports of models with PEFT's adapters: what PEFT saves, byte for byte, in whatever way the model is distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import stillframe
from stillframe.cli.inspecting import inspect
from stillframe.errors import LayoutError, SaveFailed
from stillframe.manifest import read_manifest
from stillframe.testing import run_process, run_ranks
from stillframe.testing.models import tiny_qwen3
from tests.multirank.adapters import ADAPTED, adapted, distribute_adapted, lora, quiet_about_embeddings, reference
from tests.multirank.exports import digests
from tests.multirank.stages import stage_of


def export_all(base_dir: Path, how: str, names: list[str]) -> list[list[int]]:
    """Each model into a run directory of its own, with what PEFT itself saves beside it. Returns, of each model, the
    bytes that this rank staged, and those of the adapters' files.

    PEFT writes sets in an order that differs from process to process; so this process compares.
    """
    sizes = []
    for name in names:
        run_dir = base_dir / name
        with (
            quiet_about_embeddings(),
            stillframe.Checkpointer(run_dir, model=distribute_adapted(adapted(name), how)) as ckpt,
        ):
            ckpt.save_hf(7)
            total = sum(path.stat().st_size for path in (run_dir / "hf-7").rglob("*.safetensors"))
            sizes.append([ckpt.reports[-1].staged_bytes, total])
        if not dist.is_initialized() or dist.get_rank() == 0:
            reference(base_dir / f"{name} reference", name)
            found, expected = digests(run_dir / "hf-7"), digests(base_dir / f"{name} reference")
            assert found.pop("stillframe.json")
            assert found == expected, name
    return sizes


STAGED = {"dora and modules": "50GB", "several": "50GB", "transformers": "8KB"}
"""Models, and the size of their files."""


def export_stages(base_dir: Path) -> None:
    for name, size in STAGED.items():
        model, run_dir = adapted(name), base_dir / name
        stage_of(model.base_model.model if isinstance(model, PeftModel) else model, "pp2", dist.get_rank())
        with stillframe.Checkpointer(
            run_dir, model=model, pipeline=True, save_frozen=False, max_shard_size=size, save_timeout_s=60
        ) as ckpt:
            ckpt.save_hf(7)
            if name == "several":
                ckpt.save_both(8)
        if dist.get_rank() == 0:
            reference(base_dir / f"{name} reference", name, max_shard_size=size)
            expected = digests(base_dir / f"{name} reference")
            for step in (7, 8) if name == "several" else (7,):
                found = digests(run_dir / f"hf-{step}")
                assert found.pop("stillframe.json")
                assert found == expected, (name, step)


def test_stages_of_a_pipeline_save_what_peft_saves_of_the_whole_model(tmp_path: Path) -> None:
    run_ranks(2, export_stages, tmp_path)
    assert len(list((tmp_path / "transformers" / "hf-7").glob("adapter_model-*.safetensors"))) > 1


def adapters_on_one_stage(run_dir: Path) -> None:
    model: Any = tiny_qwen3()
    if dist.get_rank() == 1:
        model.add_adapter(lora())
    model = stage_of(model, "pp2", dist.get_rank())
    with pytest.raises(LayoutError, match="rank 0 has a Qwen3ForCausalLM and rank 1 a Qwen3ForCausalLM with adapters"):
        stillframe.Checkpointer(run_dir, model=model, pipeline=True, save_timeout_s=60)


def test_adapters_on_one_stage_alone_are_refused(tmp_path: Path) -> None:
    run_ranks(2, adapters_on_one_stage, tmp_path)


def test_one_process_saves_what_peft_saves(tmp_path: Path) -> None:
    for staged, total in run_process(export_all, tmp_path, "alone", list(ADAPTED)):
        assert staged == total
    assert sorted(digests(tmp_path / "several" / "hf-7")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "second/adapter_config.json",
        "second/adapter_model.safetensors",
        "stillframe.json",
    ]
    # Both adapters may have tensors of one name; each is listed with its own place and checksum.
    stored = {
        folder + key: tuple(tensor.shape)
        for folder in ("", "second/")
        for key, tensor in load_file(tmp_path / "several" / "hf-7" / folder / "adapter_model.safetensors").items()
    }
    assert read_manifest(tmp_path / "several" / "hf-7").tensors.keys() == stored.keys()
    for name in ADAPTED:
        assert stillframe.verify(tmp_path / name / "hf-7").tensors > 8
    (found,) = inspect(tmp_path / "several" / "hf-7")
    assert {tensor.name: tensor.shape for tensor in found.tensors} == stored


@pytest.mark.parametrize(("how", "world_size"), [("fsdp", 3), ("ddp", 2)])
def test_ranks_save_what_peft_saves_each_its_part(how: str, world_size: int, tmp_path: Path) -> None:
    names = ["lora", "dora and modules", "several", "transformers"]
    for sizes in zip(*run_ranks(world_size, export_all, tmp_path, how, names), strict=True):
        total = sizes[0][1]
        assert sum(staged for staged, _ in sizes) == total
        header = 8192  # it is written by one rank alone
        assert max(staged for staged, _ in sizes) < total / world_size * 1.1 + header


def load_adapters(run_dir: Path, name: str) -> list[str]:
    """PEFT's own loading, onto a base model that never had adapters."""
    expected = adapted(name).state_dict()
    loaded = PeftModel.from_pretrained(tiny_qwen3(), run_dir / "hf-7")
    loaded.load_adapter(run_dir / "hf-7" / "second", "second")
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    return [key for key in found if not torch.equal(found[key], expected[key])]


def test_peft_loads_what_ranks_saved(tmp_path: Path) -> None:
    run_ranks(2, export_all, tmp_path, "fsdp", ["several"])
    assert run_process(load_adapters, tmp_path / "several", "several") == []


def adapters_that_differ(run_dir: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_qwen3(), lora(target_modules=["q_proj"], r=4 + dist.get_rank()))
    name = r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.default\.weight"
    with pytest.raises(SaveFailed, match=f"rank 1 has another layout than rank 0.* describe differently: {name}"):
        stillframe.Checkpointer(run_dir, model=model, save_timeout_s=60)


def test_a_rank_with_another_adapter_is_named_with_the_tensor(tmp_path: Path) -> None:
    run_ranks(2, adapters_that_differ, tmp_path)
    assert list(tmp_path.iterdir()) == []


# Checkpoints to go on from


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens = torch.randint(0, 380, (2, 8), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def made(name: str) -> tuple[Any, torch.optim.Optimizer]:
    model = distribute_adapted(adapted(name), "fsdp")
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def go_on(run_dir: Path, name: str, save_frozen: bool) -> tuple[list[float], list[float], int, int]:
    """Losses without an interruption and with one; elements that were saved of the model, and that it has in all."""
    model, optimizer = made(name)
    with stillframe.Checkpointer(run_dir, model=model, optimizer=optimizer, save_frozen=save_frozen) as ckpt:
        train(model, optimizer, range(2))
        ckpt.save_both(2)
        expected = train(model, optimizer, range(2, 4))
    model, optimizer = made(name)
    for parameter in model.parameters():
        if parameter.requires_grad or save_frozen:
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).data.zero_()
    with stillframe.Checkpointer(run_dir, model=model, optimizer=optimizer, save_frozen=save_frozen) as ckpt:
        assert ckpt.resume() is not None
        found = train(model, optimizer, range(2, 4))
    saved = sum(e.size for n, e in read_manifest(run_dir / "checkpoint-2").tensors.items() if n.startswith("model."))
    return expected, found, saved // 4, sum(p.numel() for p in model.parameters() if save_frozen or p.requires_grad)


@pytest.mark.parametrize(("name", "save_frozen"), [("lora", False), ("transformers", True)])
def test_a_training_of_adapters_goes_on_bit_for_bit(name: str, save_frozen: bool, tmp_path: Path) -> None:
    for expected, found, saved, trainable in run_ranks(2, go_on, tmp_path, name, save_frozen):
        assert found == expected
        assert len(set(found)) == 2
        assert saved == trainable
    assert "adapter_model.safetensors" in digests(tmp_path / "hf-2")
