"""Config, generation config, code and tokenizer: what transformers writes, without touching the model's own config."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from stillframe.errors import UnsupportedModel
from stillframe.layout.companions import render_companion, render_config
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_processor, tiny_qwen3, tiny_qwen3_vl_moe, tiny_tokenizer

REMOTE_CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM


class TinyConfig(Qwen3Config):
    model_type = "tiny_remote"


class TinyForCausalLM(Qwen3ForCausalLM):
    config_class = TinyConfig


TinyConfig.register_for_auto_class()
TinyForCausalLM.register_for_auto_class("AutoModelForCausalLM")
"""


def _written(files: Any) -> dict[str, bytes]:
    return {file.name: file.content for file in files}


def _on_disk(directory: Path, *, weights: bool = False) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and (weights or path.suffix != ".safetensors")
    }


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_vl_moe])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_configs_are_what_save_pretrained_writes(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    rendered = _written(render_config(make(dtype=dtype), dtype))
    make(dtype=dtype).save_pretrained(tmp_path)
    assert rendered == _on_disk(tmp_path)
    assert {"config.json", "generation_config.json"} == rendered.keys()


def test_the_models_own_config_stays_as_it_is() -> None:
    model = tiny_qwen3()
    model.to(torch.bfloat16)
    before = model.config.to_dict()
    assert b'"dtype": "bfloat16"' in _written(render_config(model, model.dtype))["config.json"]
    assert model.config.to_dict() == before


def _render_and_save(folder: Path, *, sharded: bool) -> dict[str, bytes]:
    """The rendered files of a model whose code is in `folder`; transformers' own go to `folder/reference`."""
    source = folder / "modeling_tiny.py"
    source.write_text(REMOTE_CODE)
    spec = spec_from_file_location("modeling_tiny", source)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["modeling_tiny"] = module
    try:
        spec.loader.exec_module(module)
        config = module.TinyConfig(**{k: v for k, v in tiny_qwen3().config.to_dict().items() if k != "model_type"})
        model: PreTrainedModel = module.TinyForCausalLM(config)
        model.save_pretrained(folder / "reference")
        return _written(render_config(fully_shard(model) if sharded else model, model.dtype))
    finally:
        del sys.modules["modeling_tiny"]


def _render_sharded(folder: Path) -> dict[str, bytes]:
    return _render_and_save(folder, sharded=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_code_of_a_model_from_outside_of_transformers_goes_with_it(sharded: bool, tmp_path: Path) -> None:
    if sharded:
        (rendered,) = run_ranks(1, _render_sharded, tmp_path)
    else:
        rendered = _render_and_save(tmp_path, sharded=False)
    assert rendered == _on_disk(tmp_path / "reference")
    assert rendered["modeling_tiny.py"] == REMOTE_CODE.encode()
    assert b"auto_map" in rendered["config.json"]


@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_processor])
def test_tokenizer_and_processor_are_what_they_write_themselves(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    assert _written(render_companion(make())) == _on_disk(tmp_path)


class BrokenTokenizer:
    def save_pretrained(self, directory: str) -> None:
        raise OSError("vocabulary is gone")


def test_what_cannot_be_saved_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="the BrokenTokenizer cannot be saved: OSError: vocabulary is gone"):
        render_companion(BrokenTokenizer())
    model = tiny_qwen3()
    assert model.generation_config is not None
    model.generation_config.temperature = 0.5  # without sampling: transformers refuses to save that
    with pytest.raises(UnsupportedModel, match="the config of Qwen3ForCausalLM cannot be saved"):
        render_config(model, model.dtype)
