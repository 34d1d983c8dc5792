"""Plans of Hugging Face directories: the same everywhere, and models that are refused."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from stillframe.errors import UnsupportedModel
from stillframe.layout.huggingface import plan_huggingface
from stillframe.layout.runtime import refuse_unsupported, unwrapped
from stillframe.testing.models import tiny_qwen3


def _plan(model: Any) -> Any:
    return plan_huggingface(model, max_shard_bytes=10**9, rank=0, world_size=1, plan_id=1)


def test_a_dtype_without_a_name_is_refused_by_key() -> None:
    model = tiny_qwen3()
    model.register_buffer("odd", torch.zeros(4, dtype=torch.complex128))
    with pytest.raises(UnsupportedModel, match=r"odd.*complex128"):
        _plan(model)


def test_a_name_that_is_no_unicode_is_refused() -> None:
    model = tiny_qwen3()
    model.register_buffer("bad\udc80", torch.zeros(4))
    with pytest.raises(UnsupportedModel, match=r"bad.udc80.* not valid Unicode"):
        _plan(model)


def test_a_name_that_safetensors_keeps_for_itself_is_refused() -> None:
    model = tiny_qwen3()
    model.register_buffer("__metadata__", torch.zeros(4))
    with pytest.raises(UnsupportedModel, match="'__metadata__' is no name for a tensor"):
        _plan(model)


def test_models_that_cannot_be_exported_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="Linear is not a transformers PreTrainedModel"):
        unwrapped(nn.Linear(2, 2))
    quantized = tiny_qwen3()
    quantized.hf_quantizer = object()
    with pytest.raises(UnsupportedModel, match="Qwen3ForCausalLM is quantized"):
        refuse_unsupported(quantized)
    with torch.device("meta"):
        unready = type(quantized)(quantized.config)
    with pytest.raises(UnsupportedModel, match=r"no values yet.*model\.embed_tokens\.weight"):
        refuse_unsupported(unready)


def test_the_layout_is_the_same_whatever_the_rank_and_the_hash_seed() -> None:
    plans = [
        plan_huggingface(tiny_qwen3(), max_shard_bytes=50_000, rank=rank, world_size=3, plan_id=1) for rank in range(3)
    ]
    assert len({plan.layout.digest for plan in plans}) == 1
    assert plans[0].layout == plans[1].layout == plans[2].layout
    other = plan_huggingface(tiny_qwen3(), max_shard_bytes=60_000, rank=0, world_size=3, plan_id=1)
    assert other.layout.digest != plans[0].layout.digest


def test_garbage_is_collected_again_after_a_plan_and_after_one_that_failed() -> None:
    model = tiny_qwen3()
    assert gc.isenabled()
    _plan(model)
    assert gc.isenabled()
    model.register_buffer("odd", torch.zeros(4, dtype=torch.complex128))
    with pytest.raises(UnsupportedModel):
        _plan(model)
    assert gc.isenabled()
    gc.disable()
    try:
        _plan(tiny_qwen3())
        assert not gc.isenabled()
    finally:
        gc.enable()
