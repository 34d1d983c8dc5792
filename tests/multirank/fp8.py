"""Models whose matrices have partial blocks, and fp8 as a few lines of torch over whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

FP8 = torch.float8_e4m3fn
SCALES = "_scale_inv"


def moe_with_partial_blocks(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Matrices of 320 x 192, 96 x 192, 152 x 192 and so on: the last blocks are smaller, most of which ranks cut."""
    config = Qwen3MoeConfig(
        vocab_size=60,
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=80,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=152,
        intermediate_size=200,
        decoder_sparse_step=2,
        tie_word_embeddings=False,
    )
    return _scattered(AutoModelForCausalLM.from_config(config, dtype=dtype), seed)


def model_of_whole_blocks(*, seed: int = 0, tied: bool = False) -> PreTrainedModel:
    """As transformers itself can convert back: every size is a multiple of 128."""
    sizes = {"vocab_size": 60, "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "head_dim": 64}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    return _scattered(AutoModelForCausalLM.from_config(config), seed)


def _scattered(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Values of very different sizes, so that the maximum of a block is far from those of its parts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            exponents = torch.randint(-6, 1, parameter.shape, generator=generator)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2.0**exponents)
    return model


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in fp8 and the scale of each of its blocks."""
    rows, columns = weight.shape
    down, across = -(-rows // 128), -(-columns // 128)
    whole = torch.zeros(down * 128, across * 128)
    whole[:rows, :columns] = weight
    blocks = whole.view(down, 128, across, 128)
    largest = blocks.abs().amax(dim=(1, 3))
    factor = torch.where(largest > 0, 448.0 / largest, 1.0)
    values = (blocks * factor[:, None, :, None]).clamp(-448, 448).to(FP8)
    return values.view(whole.shape)[:rows, :columns].contiguous(), 1.0 / factor


def dequantized(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = values.shape
    each = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return (values.to(torch.float32) * each).to(dtype)


def saved(directory: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}


def expected(whole: Mapping[str, torch.Tensor], keys_in_fp8: set[str]) -> dict[str, torch.Tensor]:
    """What an export in fp8 holds of a model that `save_pretrained` saves as `whole`."""
    found = {}
    for key, tensor in whole.items():
        if key in keys_in_fp8:
            found[key], found[key + SCALES] = quantized(tensor)
        else:
            found[key] = tensor.to(torch.bfloat16)
    return found


def assert_same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[key].dtype, other[key].shape), key
        same = torch.equal(tensor.contiguous().view(torch.uint8), other[key].contiguous().view(torch.uint8))
        assert same, key
