"""The tiny models are what the rest of the suite stands on: they train, save, reload, and are all unlike."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from stillframe.testing.models import (
    tiny_batch,
    tiny_processor,
    tiny_qwen3,
    tiny_qwen3_moe,
    tiny_qwen3_vl_moe,
    tiny_tokenizer,
)

MAKERS = {
    "qwen3-tied": tiny_qwen3,
    "qwen3-untied": lambda **options: tiny_qwen3(tied=False, **options),
    "qwen3-moe": tiny_qwen3_moe,
    "qwen3-vl-moe": tiny_qwen3_vl_moe,
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
Maker = Callable[..., PreTrainedModel]


@makers
@dtypes
def test_a_step_gives_every_parameter_a_gradient(make: Maker, dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    loss = model(**tiny_batch(model)).loss
    loss.backward()
    assert torch.isfinite(loss)
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


@makers
@dtypes
def test_it_is_saved_in_one_file_or_many_and_reloaded_bit_by_bit(
    make: Maker, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make(dtype=dtype)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert len(list((tmp_path / "many").glob("*.safetensors"))) >= 4
    size_bytes = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert 100_000 < size_bytes < 2_000_000

    auto_class = AutoModelForImageTextToText if hasattr(model.config, "vision_config") else AutoModelForCausalLM
    for directory in ("one", "many"):
        reloaded, info = auto_class.from_pretrained(tmp_path / directory, output_loading_info=True)
        assert not any(info.values())
        theirs = reloaded.state_dict()
        assert theirs.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


@makers
def test_the_seed_decides_the_weights_and_the_random_state_is_left_alone(make: Maker) -> None:
    before = torch.random.get_rng_state()
    first, same, other = (digests(make(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == same
    assert not set(first.values()) & set(other.values())


@makers
@dtypes
def test_no_two_tensors_are_alike(make: Maker, dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    names = [name for name, _ in model.named_parameters()]
    found = digests(model)
    alike = [pair for pair in itertools.combinations(names, 2) if found[pair[0]] == found[pair[1]]]
    assert alike == []


@makers
def test_three_ranks_would_hold_unequal_rows_of_most_tensors(make: Maker) -> None:
    rows = [parameter.shape[0] for parameter in make().parameters()]
    assert sum(count % 3 != 0 for count in rows) > 0.9 * len(rows)


def test_the_tokenizer_is_complete(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 384
    text = "Blank lines are ignored. Žluťoučký kůň 🐎"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"

    tokenizer.chat_template = "changed"
    assert tiny_tokenizer().chat_template != "changed"

    tiny_tokenizer().save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded.chat_template == tiny_tokenizer().chat_template


def test_the_processor_feeds_the_vision_language_model(tmp_path: Path) -> None:
    processor = tiny_processor()
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    prompt = "<|vision_start|><|image_pad|><|vision_end|>What is this?"
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    model = tiny_qwen3_vl_moe().eval()
    assert torch.isfinite(model(**inputs).logits).all()
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]

    processor.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    again = AutoProcessor.from_pretrained(tmp_path)(images=[image], text=[prompt], return_tensors="pt")
    assert again.keys() == inputs.keys()
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)


def digests(model: PreTrainedModel) -> dict[str, str]:
    """The hash of each parameter's bytes."""
    return {
        name: hashlib.sha256(parameter.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }
