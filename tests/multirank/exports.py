"""What the export tests run on the ranks: build a model, distribute it, save it, all through the public interface."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

import stillframe
from stillframe.testing.models import (
    tiny_processor,
    tiny_qwen3,
    tiny_qwen3_moe,
    tiny_qwen3_vl_moe,
    tiny_tokenizer,
)

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": tiny_qwen3,
    "qwen3_moe": tiny_qwen3_moe,
    "qwen3_vl_moe": tiny_qwen3_vl_moe,
}


def build(name: str, source_dir: Path | None) -> PreTrainedModel:
    """A model from its config, or the same one reloaded from `source_dir`; the vision tower, if any, is frozen."""
    transformers_logging.disable_progress_bar()
    model = MODELS[name]()
    if source_dir is not None:
        assert AutoConfig.from_pretrained(source_dir).model_type == model.config.model_type
        model = type(model).from_pretrained(source_dir)
    if name == "qwen3_vl_moe":
        model.model.visual.requires_grad_(False)
    return model


def distribute(model: PreTrainedModel, how: str) -> Any:
    """`model` with FSDP2 (layer by layer, then the rest), in DDP, or as it is on every rank."""
    if how == "fsdp":
        text = getattr(model.model, "language_model", model.model)
        for layer in text.layers:
            fully_shard(layer)
        return fully_shard(model)
    return DistributedDataParallel(model) if how == "ddp" else model


def companions(name: str) -> dict[str, Any]:
    if name == "qwen3_vl_moe":
        return {"processor": tiny_processor()}
    return {"tokenizer": tiny_tokenizer()}


def export(
    run_dir: Path, name: str, source_dir: Path | None, how: str, sizes: tuple[str, ...]
) -> list[tuple[int, bool]]:
    """Export once for each shard size into `run_dir/<size>`; returns (staged bytes, is sharded) of each."""
    model = distribute(build(name, source_dir), how)
    saved = []
    for size in sizes:
        with stillframe.Checkpointer(run_dir / size, model=model, max_shard_size=size, **companions(name)) as ckpt:
            ckpt.save_hf(7)
            saved.append((ckpt.reports[-1].staged_bytes, isinstance(model, FSDPModule)))
    return saved


def reference(directory: Path, name: str, source_dir: Path | None, size: str) -> None:
    """What transformers itself writes for the same, unsharded model."""
    build(name, source_dir).save_pretrained(directory, max_shard_size=size)
    for companion in companions(name).values():
        companion.save_pretrained(directory)


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file below `directory`, by relative name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def filled(model: PreTrainedModel, value: float) -> None:
    """Set every parameter to `value`, in place, on this rank's shards."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
