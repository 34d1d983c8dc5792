"""Tiny but real Transformers models, a tokenizer and a processor, made on the spot: no download, no network.

Each model has some hundred kilobytes, so that `max_shard_size="50KB"` gives many files and the default one. Sizes do
not divide by 3, so that three ranks hold unequal shards, and the 4 experts leave the third with none. Every tensor is
unlike every other, norms and biases included: an exchange of two cannot go unnoticed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_TOKEN_IDS = {token: token_id for token_id, token in enumerate(_SPECIAL_TOKENS)}
_TOKENIZER_VOCAB_SIZE = 384
_VOCAB_SIZE = 388
"""A little more than the tokenizer has, as is usual; over 3 ranks 130, 130, 128 rows."""

_TEXT_SIZES: dict[str, Any] = {
    "vocab_size": _VOCAB_SIZE,
    "hidden_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": _TOKEN_IDS["<|endoftext|>"],
    "eos_token_id": _TOKEN_IDS["<|im_end|>"],
}
# Inner sizes in bytes are multiples of 16 in bfloat16, which torch's grouped matrix product asks for.
_EXPERT_SIZES: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_PATCH_SIZE = 8
_MERGE_SIZE = 2
_VISION_SIZES: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_heads": 2,
    "num_position_embeddings": 64,
    "out_hidden_size": _TEXT_SIZES["hidden_size"],
    "patch_size": _PATCH_SIZE,
    "spatial_merge_size": _MERGE_SIZE,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [0],
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_qwen3(*, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A dense Qwen3 for causal language modelling; `tied` shares the embedding with the output layer."""
    config = Qwen3Config(**_TEXT_SIZES, intermediate_size=80, tie_word_embeddings=tied)
    return _build(AutoModelForCausalLM.from_config, config, seed, dtype)


def tiny_qwen3_moe(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Qwen3-MoE with 4 experts per layer: fused in the model, separate in the files."""
    config = Qwen3MoeConfig(**_TEXT_SIZES, **_EXPERT_SIZES, intermediate_size=80, tie_word_embeddings=False)
    return _build(AutoModelForCausalLM.from_config, config, seed, dtype)


def tiny_qwen3_vl_moe(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Qwen3-VL-MoE: a language model with 4 experts per layer, a vision tower, and the mergers between them."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLMoeConfig(
        text_config={**_TEXT_SIZES, **_EXPERT_SIZES, "intermediate_size": 80, "rope_parameters": rope},
        vision_config=_VISION_SIZES,
        image_token_id=_TOKEN_IDS["<|image_pad|>"],
        video_token_id=_TOKEN_IDS["<|video_pad|>"],
        vision_start_token_id=_TOKEN_IDS["<|vision_start|>"],
        vision_end_token_id=_TOKEN_IDS["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return _build(AutoModelForImageTextToText.from_config, config, seed, dtype)


def tiny_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen's special tokens and a chat template; a new object, trained once."""
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_processor() -> ProcessorMixin:
    """A processor that turns text with `<|image_pad|>` and images into the inputs of `tiny_qwen3_vl_moe`.

    Its class is PaddleOCRVLProcessor, which expands image tokens as Qwen's does. Qwen's own needs torchvision for its
    videos, and torchvision's published wheels do not load beside a CPU build of torch; this one needs Pillow only.
    """
    from transformers import PaddleOCRVLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    side = _PATCH_SIZE * _MERGE_SIZE
    size = {"shortest_edge": side * side, "longest_edge": 16 * side * side}
    image_processor = Qwen2VLImageProcessorPil(patch_size=_PATCH_SIZE, merge_size=_MERGE_SIZE, size=size)
    return PaddleOCRVLProcessor(image_processor, tiny_tokenizer(), chat_template=_CHAT_TEMPLATE)


def tiny_batch(model: PreTrainedModel, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs and labels for one training step of one of these models: 2 sequences of 32 tokens.

    For the vision-language model each sequence begins with an image of 32 x 32 pixels, 4 tokens after merging.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(len(_SPECIAL_TOKENS), _TOKENIZER_VOCAB_SIZE, (2, 32), generator=generator)
    if not hasattr(model.config, "vision_config"):
        return {"input_ids": text, "labels": text.clone()}
    image = [_TOKEN_IDS[token] for token in ("<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>")]
    text[:, : len(image)] = torch.tensor(image)
    patches = 2 * 4 * _MERGE_SIZE**2
    return {
        "input_ids": text,
        "labels": text.clone(),
        "mm_token_type_ids": (text == _TOKEN_IDS["<|image_pad|>"]).long(),
        "pixel_values": torch.randn(patches, 3 * 2 * _PATCH_SIZE**2, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def _build(
    from_config: Callable[..., PreTrainedModel], config: PretrainedConfig, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """The model on the CPU, in training mode; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = from_config(config, dtype=dtype)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # As initialised, norms are all ones and biases all zeros.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise.to(dtype))
    return model


@functools.cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=_TOKENIZER_VOCAB_SIZE,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=list(_SPECIAL_TOKENS),
        show_progress=False,
    )
    # English prose that every Python carries.
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:20]], trainer)
    text: str = tokenizer.to_str()
    return text
