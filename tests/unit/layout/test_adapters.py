"""Adapters in one process: files that PEFT makes in unusual cases, what is refused, and that PEFT is not needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

import stillframe
from stillframe.errors import NotACheckpoint, OptionError, UnsupportedModel
from stillframe.layout.adapters import plan_adapters, saved_adapters
from stillframe.testing.models import tiny_qwen3, tiny_tokenizer
from tests.multirank.adapters import adapted, fill, lora
from tests.multirank.exports import digests


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    transformers_logging.disable_progress_bar()


def assert_saved_as_by_its_own(model: Any, tmp_path: Path, *, tokenizer: Any = None, **options: Any) -> dict[str, str]:
    """The files of an export of `model`, which its own `save_pretrained` writes alike."""
    sharding = {} if isinstance(model, PeftModel) else options
    with stillframe.Checkpointer(tmp_path / "run", model=model, tokenizer=tokenizer, **options) as ckpt:
        directory = ckpt.save_hf(1)
    model.save_pretrained(tmp_path / "reference", **sharding)
    if tokenizer is not None:
        tokenizer.save_pretrained(tmp_path / "reference")
    found, expected = digests(directory), digests(tmp_path / "reference")
    assert found.pop("stillframe.json")
    assert found == expected
    return found


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 4)


def two_named() -> PeftModel:
    model = get_peft_model(Plain(), LoraConfig(r=2, target_modules=["first"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["second"]))
    return model


METHODS: dict[str, Any] = {
    "two with names of their own": two_named,
    "bias of the layers": lambda: get_peft_model(
        Plain(), LoraConfig(r=2, target_modules=["first"], bias="lora_only", modules_to_save=["second"])
    ),
    "all biases": lambda: get_peft_model(Plain(), LoraConfig(r=2, target_modules=["second"], bias="all")),
    "trainable tokens": lambda: get_peft_model(tiny_qwen3(tied=False), lora(trainable_token_indices=[1, 5, 9])),
    "ia3": lambda: get_peft_model(
        tiny_qwen3(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "bfloat16": lambda: get_peft_model(tiny_qwen3(dtype=torch.bfloat16), lora(), autocast_adapter_dtype=False),
}


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_and_modules_are_saved_as_peft_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folders = {""} if "two" not in name else {"one/", "two/"}
    files = assert_saved_as_by_its_own(fill(METHODS[name]()), tmp_path)
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert files.keys() == {"README.md"} | {folder + name for folder in folders for name in names}


def test_adapters_of_a_transformers_model_are_split_as_transformers_does(tmp_path: Path) -> None:
    files = assert_saved_as_by_its_own(
        adapted("transformers"), tmp_path, tokenizer=tiny_tokenizer(), max_shard_size="5KB"
    )
    assert len([name for name in files if name.startswith("adapter_model-0000")]) > 2
    assert {"tokenizer.json", "model.safetensors.index.json"} <= files.keys()


def test_a_model_and_its_configs_stay_as_they_are(tmp_path: Path) -> None:
    base = tiny_qwen3()
    base.name_or_path = ""
    model = fill(get_peft_model(base, lora()))
    model.base_model.model.name_or_path = "somebody/base"
    before = {name: config.to_dict() for name, config in model.peft_config.items()}
    with stillframe.Checkpointer(tmp_path, model=model) as ckpt:
        ckpt.save_hf(1)
    assert {name: config.to_dict() for name, config in model.peft_config.items()} == before
    assert '"base_model_name_or_path": "somebody/base"' in (tmp_path / "hf-1" / "adapter_config.json").read_text()


def test_a_cast_is_of_the_adapters_too(tmp_path: Path) -> None:
    model = adapted("lora")
    with stillframe.Checkpointer(tmp_path, model=model, save_dtype="bfloat16", keep_in_fp32="lora_B") as ckpt:
        ckpt.save_hf(1)
    for key, tensor in load_file(tmp_path / "hf-1" / "adapter_model.safetensors").items():
        name = key.replace(".weight", ".default.weight")
        of_model = model.state_dict()[name]
        assert torch.equal(tensor, of_model if "lora_B" in key else of_model.bfloat16()), key


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_another_adapter_is_saved_once_it_is_chosen(tmp_path: Path) -> None:
    """Nothing of the modules changes then, so the plan must be made anew for another reason."""
    model = adapted("transformers")
    model.add_adapter(lora(r=2), "other")
    model.set_adapter("default")
    with stillframe.Checkpointer(tmp_path, model=model) as ckpt:
        shapes = []
        for step, name in enumerate(("default", "other", "default")):
            model.set_adapter(name)
            stored = load_file(ckpt.save_hf(step) / "adapter_model.safetensors")
            shapes.append({tensor.shape[0] for key, tensor in stored.items() if "lora_A" in key})
        assert shapes == [{4}, {2}, {4}]
        model.set_adapter(["default", "other"])
        with pytest.raises(stillframe.errors.SaveFailed, match=r"has 2 active adapters, default, other, .*set_adapter"):
            ckpt.save_hf(9)
        model.delete_adapter("other")
        model.delete_adapter("default")
        assert (ckpt.save_hf(10) / "model.safetensors").exists()


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "prompt": (
        lambda: get_peft_model(tiny_qwen3(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        UnsupportedModel,
        r"of its adapter 'default' PEFT saves values that it computes \(PROMPT_TUNING\).* with PEFT itself",
    ),
    "computed": (
        lambda: get_peft_model(
            Plain(),
            VBLoRAConfig(r=2, target_modules=["first"], vector_length=2, num_vectors=6, save_only_topk_weights=True),
        ),
        UnsupportedModel,
        r"of its adapter 'default' PEFT saves values that it computes \(VBLORA\)",
    ),
    "a name that is none of a folder": (
        lambda: get_peft_model(Plain(), LoraConfig(target_modules=["first"]), adapter_name="a/b"),
        UnsupportedModel,
        r"the adapter 'a/b' has no name that a folder can have",
    ),
    "a name that no file can have": (
        lambda: get_peft_model(Plain(), LoraConfig(target_modules=["first"]), adapter_name="a\udc80"),
        UnsupportedModel,
        r"the adapter 'a\\udc80' has no name that a folder can have",
    ),
    "on the meta device": (
        lambda: adapted("lora").to("meta"),
        UnsupportedModel,
        "PeftModelForCausalLM: 18 tensors of its adapters have no values yet",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_so_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, error, said = REFUSED[name]
    with pytest.raises(error, match=said):
        stillframe.Checkpointer(tmp_path, model=make())
    assert list(tmp_path.iterdir()) == []


def test_options_that_adapters_have_no_use_for_are_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"key_mapping": {}}, "key_mapping has no place in the export of adapters"),
        ({"layout": "hub"}, "layout='hub' has no place in the export of adapters"),
        ({"save_dtype": "fp8"}, "save_dtype='fp8' has no place in the export of adapters"),
        ({"config": PretrainedConfig()}, "config is for modules that have none; PeftModelForCausalLM"),
    ):
        with pytest.raises(OptionError, match=said):
            stillframe.Checkpointer(tmp_path, model=adapted("lora"), **options)


def test_a_transformers_model_that_only_says_that_it_has_adapters_is_refused() -> None:
    model = tiny_qwen3()
    model._hf_peft_config_loaded = True
    with pytest.raises(UnsupportedModel, match="says that it carries PEFT adapters, but has none"):
        saved_adapters(model)


def test_a_plan_has_no_other_tensor_of_the_model_than_those_of_the_adapters() -> None:
    plan = plan_adapters(adapted("lora"), max_shard_bytes=10**9, rank=0, world_size=1, plan_id=1)
    assert len(plan.tensors) == 18
    assert all("lora_" in name for name in plan.tensors)


def test_a_loader_of_whole_models_says_what_reads_an_adapter(tmp_path: Path) -> None:
    with stillframe.Checkpointer(tmp_path, model=adapted("lora")) as ckpt:
        ckpt.save_hf(1)
    with pytest.raises(NotACheckpoint, match=r"it is an adapter, which peft\.PeftModel\.from_pretrained loads"):
        stillframe.load_hf(tmp_path / "hf-1", tiny_qwen3())
    for name in ("lora", "transformers"):
        with pytest.raises(UnsupportedModel, match="carries PEFT adapters; load the weights before adding them"):
            stillframe.load_hf(tmp_path / "hf-1", adapted(name))


def test_peft_is_not_imported_for_a_model_without_adapters(tmp_path: Path) -> None:
    program = f"""
import sys, stillframe
from stillframe.testing.models import tiny_qwen3
with stillframe.Checkpointer({str(tmp_path)!r}, model=tiny_qwen3()) as ckpt:
    ckpt.save_both(1)
stillframe.load_hf({str(tmp_path / "hf-1")!r}, tiny_qwen3(seed=1))
print("peft" in sys.modules)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (finished.stdout, finished.stderr) == ("False\n", "")
