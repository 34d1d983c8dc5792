"""Keys that are not the module's own names: wrappers inside a model leave no trace, and a user's own mapping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

import stillframe
from stillframe.errors import OptionError, UnsupportedModel
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_batch, tiny_qwen3, tiny_qwen3_moe, tiny_tokenizer
from tests.multirank.exports import MODELS, build, digests, filled

SIZE = "50KB"


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_holds(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = {name.replace("_orig_mod.", ""): full(tensor) for name, tensor in model.state_dict().items()}
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


# Wrappers


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def wrap(model: PreTrainedModel) -> PreTrainedModel:
    """Each layer in another wrapper, and the vision tower, which has conversions of its own, in one too."""
    text: Any = getattr(model.model, "language_model", model.model)
    wraps: list[Callable[[nn.Module], nn.Module]] = [
        compiled,
        checkpoint_wrapper,
        lambda layer: compiled(checkpoint_wrapper(layer)),
    ]
    for index, layer in enumerate(text.layers):
        text.layers[index] = wraps[index % len(wraps)](layer)
    if hasattr(model.model, "visual"):
        model.model.visual = compiled(model.model.visual)
    model.model = compiled(model.model)
    return model


def shard(model: PreTrainedModel) -> PreTrainedModel:
    text: Any = getattr(model.model, "language_model", model.model)
    for layer in text.layers:
        fully_shard(layer, reshard_after_forward=False)
    return fully_shard(model)


def save_and_load_wrapped(run_dir: Path, name: str) -> None:
    model = shard(wrap(build(name, None)))
    assert any("_orig_mod" in key for key in model.state_dict())
    saved = {key.replace("_orig_mod.", ""): full(tensor).clone() for key, tensor in model.state_dict().items()}
    if name == "qwen3":
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(**tiny_batch(model))
        layers: Any = model.model.layers
        assert not any(isinstance(parameter, DTensor) for parameter in layers.parameters()), "left gathered by FSDP"
    with stillframe.Checkpointer(run_dir, model=model, max_shard_size=SIZE) as ckpt:
        ckpt.save_hf(7)
    filled(model, 0.5)
    stillframe.load_hf(run_dir / "hf-7", model)
    assert_holds(model, saved)


@pytest.mark.parametrize("name", MODELS)
def test_wrapped_modules_are_saved_and_loaded_as_if_they_were_not(name: str, tmp_path: Path) -> None:
    run_ranks(2, save_and_load_wrapped, tmp_path / "run", name)
    build(name, None).save_pretrained(tmp_path / "reference", max_shard_size=SIZE)
    found = digests(tmp_path / "run" / "hf-7")
    assert found.pop("stillframe.json")
    assert found == digests(tmp_path / "reference")


# A user's own mapping

MAPPING = {
    r"^": "model.",
    r"^blocks\.(\d+)\.": r"model.layers.\1.",
    r"^blocks\.(\d+)\.mix\.": r"model.layers.\1.mixer.",
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(30, 25)
        self.norm = nn.BatchNorm1d(25)


class Plain(nn.Module):
    """No transformers model: uneven over two ranks, with buffers, one of them a scalar, and a tied weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.embed = nn.Embedding(101, 30)
            self.blocks = nn.ModuleList([Block() for _ in range(3)])
            self.out = nn.Linear(30, 101, bias=False)
            self.out.weight = self.embed.weight
            for block in self.blocks:
                block.norm.running_mean.normal_()  # type: ignore[union-attr,operator]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(tensor).detach().clone() for name, tensor in model.state_dict().items()}


def shard_plain(model: Plain) -> Plain:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def save_and_load_plain(run_dir: Path) -> None:
    options: dict[str, Any] = {"max_shard_size": "9KB", "key_mapping": MAPPING, "tokenizer": tiny_tokenizer()}
    with stillframe.Checkpointer(run_dir, model=shard_plain(Plain(1)), **options) as ckpt:
        ckpt.save_hf(7)
    model = shard_plain(Plain(2))
    report = stillframe.load_hf(run_dir / "hf-7", model, key_mapping=MAPPING)
    assert (report.missing, report.unexpected) == ((), ())
    assert_holds(model, values(Plain(1)))


def test_any_module_is_saved_under_mapped_keys_in_the_files_of_the_hub(tmp_path: Path) -> None:
    run_ranks(2, save_and_load_plain, tmp_path / "run")
    state = {name: tensor for name, tensor in values(Plain(1)).items() if name != "out.weight"}
    mapped = {f"model.{n.replace('blocks', 'layers').replace('.mix.', '.mixer.')}": t for n, t in state.items()}
    (tmp_path / "reference").mkdir()
    save_torch_state_dict(mapped, tmp_path / "reference", max_shard_size="9KB")
    tiny_tokenizer().save_pretrained(tmp_path / "reference")
    expected, found = digests(tmp_path / "reference"), digests(tmp_path / "run" / "hf-7")
    assert len([name for name in expected if name.startswith("model-")]) > 2
    # The hub's index is the same but for the number of parameters, which transformers puts in, and the order of keys.
    assert expected.pop("model.safetensors.index.json") != found.pop("model.safetensors.index.json")
    assert found.pop("stillframe.json")
    assert found == expected
    one, other = Plain(2), Plain(3)
    stillframe.load_hf(tmp_path / "run" / "hf-7", one, key_mapping=MAPPING)
    stillframe.load_hf(tmp_path / "reference", other, key_mapping=MAPPING)
    assert_holds(one, values(Plain(1)))
    assert_holds(other, values(Plain(1)))


def save_mapped_transformers_model(run_dir: Path) -> None:
    model = tiny_qwen3_moe(seed=1)
    for layer in model.model.layers:
        fully_shard(layer)
    with stillframe.Checkpointer(run_dir, model=fully_shard(model), key_mapping={r"^model\.": "decoder."}) as ckpt:
        ckpt.save_hf(7)


def test_a_mapping_comes_after_the_conversions_of_transformers(tmp_path: Path) -> None:
    run_ranks(2, save_mapped_transformers_model, tmp_path)
    saved = tiny_qwen3_moe(seed=1)
    saved.save_pretrained(tmp_path / "reference")
    expected = load_file(tmp_path / "reference" / "model.safetensors")
    found = load_file(tmp_path / "hf-7" / "model.safetensors")
    assert "decoder.layers.2.mlp.experts.3.up_proj.weight" in found
    assert found.keys() == {name.replace("model.", "decoder.") for name in expected}
    again = type(saved).from_pretrained(tmp_path / "hf-7", key_mapping={r"^decoder\.": "model."})
    assert_holds(again, values(saved))
    model = tiny_qwen3_moe(seed=2)
    stillframe.load_hf(tmp_path / "hf-7", model, key_mapping={r"^model\.": "decoder."})
    assert_holds(model, values(saved))


def export_what_safetensors_cannot_hold(run_dir: Path) -> None:
    for name, dtype, said in (
        ("bad\udc80", torch.float32, r"'bad\\udc80' is not valid Unicode"),
        ("odd", torch.complex128, "odd has dtype torch.complex128, for which safetensors has no name"),
    ):
        model = Plain(1)
        model.register_buffer(name, torch.zeros(4, dtype=dtype))
        with pytest.raises(UnsupportedModel, match=said):
            stillframe.Checkpointer(run_dir, model=shard_plain(model), key_mapping={})


def test_names_and_dtypes_that_safetensors_cannot_hold_are_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(2, export_what_safetensors_cannot_hold, tmp_path)
    assert list(tmp_path.iterdir()) == []


# In one process


def test_an_empty_mapping_exports_a_module_under_its_own_names_with_no_config_but_a_given_one(tmp_path: Path) -> None:
    saved = Plain(1)
    with stillframe.Checkpointer(tmp_path / "bare", model=saved, key_mapping={}) as ckpt:
        ckpt.save_hf(1)
    assert sorted(digests(tmp_path / "bare" / "hf-1")) == ["model.safetensors", "stillframe.json"]
    config = PretrainedConfig(architectures=["Plain"])
    options: dict[str, Any] = {"key_mapping": {}, "save_dtype": "bfloat16", "keep_in_fp32": "norm"}
    with stillframe.Checkpointer(tmp_path / "cast", model=saved, config=config, **options) as ckpt:
        ckpt.save_hf(1)
    assert PretrainedConfig.from_pretrained(tmp_path / "cast" / "hf-1").architectures == ["Plain"]
    kept = {name for name in saved.state_dict() if "norm" in name}
    stored = load_file(tmp_path / "cast" / "hf-1" / "model.safetensors")
    assert stored.keys() == saved.state_dict().keys() - {"out.weight"}
    assert {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16} == kept
    model = Plain(2)
    stillframe.load_hf(tmp_path / "bare" / "hf-1", model, key_mapping={})
    assert_holds(model, values(saved))


def test_what_cannot_be_exported_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = Plain(1)
    with pytest.raises(UnsupportedModel, match=r"Plain is not a transformers PreTrainedModel.*\{\}"):
        stillframe.Checkpointer(tmp_path, model=model)
    with pytest.raises(UnsupportedModel, match=r"'blocks\.0\.mix\.weight' and .* one key, 'weight'"):
        stillframe.Checkpointer(tmp_path, model=model, key_mapping={r"^blocks\..*\.": ""})
    with pytest.raises(OptionError, match="config is for modules that have none; Qwen3ForCausalLM"):
        stillframe.Checkpointer(tmp_path, model=tiny_qwen3(), config=PretrainedConfig())
    assert list(tmp_path.iterdir()) == []
