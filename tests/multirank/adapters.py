"""Models with PEFT's adapters, whose tensors are all unlike each other; and PEFT's own save of the same model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging as transformers_logging

from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe


def fill(model: nn.Module) -> Any:
    """`model` with other values in its adapters than those that PEFT starts with, many of which are zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options})


def with_lora() -> PeftModel:
    return get_peft_model(tiny_qwen3(), lora(task_type="CAUSAL_LM"))


def with_dora_and_modules() -> PeftModel:
    return get_peft_model(tiny_qwen3(tied=False), lora(use_dora=True, modules_to_save=["lm_head", "norm"]))


def with_several() -> PeftModel:
    model = get_peft_model(tiny_qwen3(), lora())
    model.add_adapter("second", lora(r=3, target_modules=["o_proj", "q_proj"]))
    model.set_adapter("second")
    return model


def with_embeddings() -> PeftModel:
    """PEFT saves the embeddings themselves, too, once they are a target, and says so."""
    return get_peft_model(tiny_qwen3(), lora(target_modules=["embed_tokens", "q_proj"]))


def of_transformers() -> Any:
    model = tiny_qwen3()
    model.add_adapter(lora())
    return model


def with_expert_parameters() -> PeftModel:
    return get_peft_model(tiny_qwen3_moe(), lora(target_modules=["q_proj"], target_parameters=["experts.down_proj"]))


ADAPTED: dict[str, Callable[[], Any]] = {
    "lora": with_lora,
    "dora and modules": with_dora_and_modules,
    "several": with_several,
    "embeddings": with_embeddings,
    "transformers": of_transformers,
    "expert parameters": with_expert_parameters,
}


def adapted(name: str) -> Any:
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    return fill(ADAPTED[name]())


def distribute_adapted(model: Any, how: str) -> Any:
    """`model` with FSDP2, base model and adapters alike; in DDP; or as it is."""
    if how == "fsdp":
        base = model.base_model.model if isinstance(model, PeftModel) else model
        for layer in base.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    return DistributedDataParallel(model) if how == "ddp" else model


def reference(directory: Path, name: str, **options: Any) -> None:
    """What PEFT itself, or transformers, saves of the same, unsharded model."""
    with quiet_about_embeddings():
        adapted(name).save_pretrained(directory, **options)


def quiet_about_embeddings() -> Any:
    return warnings.catch_warnings(action="ignore", category=UserWarning)
