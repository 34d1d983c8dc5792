"""The model and its tokenizer: from a Transformers directory, or fresh from a configuration table."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

import stillframe
from stillframe.errors import OptionError
from stillframe.train import parallel
from stillframe.train.config import ModelConfig
from stillframe.train.parallel import Ranks

LEGACY_FIELDS = {"rope_theta", "rope_scaling"}
"""Fields that Transformers 5 still takes, as the older form of `rope_parameters`, though no class declares them."""


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of `model.tokenizer`, else of `model.path`; a directory, nothing is downloaded."""
    directory = config.tokenizer or config.path
    name = "model.tokenizer" if config.tokenizer else "model.path"
    _require_directory(directory, name)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise OptionError(f"{name}: no tokenizer can be loaded from {directory}: {_first_line(error)}") from error


def build_model(config: ModelConfig, *, vocab_size: int, seed: int, compute_dtype: torch.dtype, ranks: Ranks) -> Any:
    """The model in training mode on the ranks' device, sharded over them, with its weights. Collective.

    From a directory, the model is made without weights and sharded, and each rank then reads its own bytes of them.
    From a table, each rank draws the whole model from `seed` in host memory and keeps its part: the same weights at
    any number of ranks, for 4 bytes of host memory per parameter and rank while it starts.

    Raises `OptionError`: a directory or table that Transformers knows no model for, or a vocabulary smaller than the
    tokenizer's `vocab_size`; `LoadError`: weights that cannot be loaded.
    """
    model_config = _config_of(config)
    is_composed = _mapping_of(model_config) is MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class = AutoModelForImageTextToText if is_composed else AutoModelForCausalLM
    if model_config.get_text_config().vocab_size < vocab_size:
        raise OptionError(
            f"model: its vocabulary of {model_config.get_text_config().vocab_size} is smaller than "
            f"the tokenizer's of {vocab_size}"
        )
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(seed)
    with torch.device("cpu" if config.path is None else "meta"):
        model = auto_class.from_config(model_config, dtype=dtype)  # type: ignore[no-untyped-call]
    if config.activation_checkpointing:
        # Renamed in the course of Transformers 5; both checkpoint each block, without reentrance.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    parallel.shard(model, ranks, compute_dtype)
    if config.path is None:
        model.to(ranks.device)
    else:
        model.to_empty(device=ranks.device)
        model.tie_weights()
        stillframe.load_hf(config.path, model)
        model.init_weights()  # only what no checkpoint holds, such as rotary frequencies
        if (Path(config.path) / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(config.path)
    return model.train()


def _config_of(config: ModelConfig) -> PreTrainedConfig:
    if config.path is not None:
        _require_directory(config.path, "model.path")
        try:
            return AutoConfig.from_pretrained(config.path, local_files_only=True)  # type: ignore[no-any-return]
        except (OSError, ValueError) as error:
            raise OptionError(f"model.path: no model in {config.path}: {_first_line(error)}") from error
    assert config.config is not None
    return _config_from_table(config.config)


def _config_from_table(table: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of `model_type` with the table's other fields; those it does not know are refused."""
    fields = {name: value for name, value in table.items() if name != "model_type"}
    try:
        model_config = AutoConfig.for_model(table["model_type"], **fields)
    except Exception as error:  # each config class refuses illegal values in its own way
        raise OptionError(f"[model.config]: Transformers refuses it: {_first_line(error)}") from error
    model_class = _mapping_of(model_config)[type(model_config)]
    model_source = inspect.getsource(importlib.import_module(model_class.__module__))
    _refuse_unknown(fields, model_config, model_source, "model.config")
    return model_config


def _refuse_unknown(fields: Mapping[str, Any], model_config: PreTrainedConfig, model_source: str, where: str) -> None:
    """Refuse fields that mean nothing, which Transformers would keep without a word.

    A field means something if its class declares it, or if the model's source reads it: Qwen3-MoE's `head_dim` is such.
    """
    known = set(type(model_config)().to_dict()) | set(model_config.attribute_map) | LEGACY_FIELDS
    for name, value in fields.items():
        if name in model_config.sub_configs and isinstance(value, dict):
            _refuse_unknown(value, getattr(model_config, name), model_source, f"{where}.{name}")
        elif name not in known and not re.search(rf"\b{re.escape(name)}\b", model_source):
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise OptionError(f"{where}.{name}: {type(model_config).__name__} has no such field{hint}")


def _mapping_of(model_config: PreTrainedConfig) -> Any:
    """The auto mapping that has a language model for it: the composed (vision-language) one's where there is one."""
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(model_config) in mapping:
            return mapping
    raise OptionError(f"model: model_type {model_config.model_type!r} has no causal language model in Transformers")


def _require_directory(directory: str | None, name: str) -> None:
    if directory is None or not Path(directory).is_dir():
        raise OptionError(f"{name} = {directory!r}: no such directory")


def _first_line(error: Exception) -> str:
    """Transformers' messages run over many lines; the first ones that say something, in one."""
    return " ".join(str(error).split())[:300]
