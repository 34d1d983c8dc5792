"""`load_hf` in one process: every form of a directory, bit for bit, or an error that leaves the model as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel, Tipsv2TextConfig, Tipsv2TextModel, conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, PermuteForRope, WeightConverter

import stillframe
from stillframe.errors import CorruptCheckpoint, LoadError, ModelMismatch, NotACheckpoint, OptionError, UnsupportedModel
from stillframe.load.keys import load_keys
from stillframe.load.safetensors import StoredTensor
from stillframe.load.sources import Permutation
from stillframe.testing.models import tiny_batch, tiny_qwen3, tiny_qwen3_moe, tiny_qwen3_vl_moe
from stillframe.wrappers import clean_name

MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen3 tied": tiny_qwen3,
    "qwen3 untied": lambda **options: tiny_qwen3(tied=False, **options),
    "qwen3_moe": tiny_qwen3_moe,
    "qwen3_vl_moe": tiny_qwen3_vl_moe,
}
WEIGHTS = "model.safetensors"


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that a model holds, buffers that are never saved included."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def saved_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before, objects = values(model), {name: id(p) for name, p in model.named_parameters()}
    yield
    assert_same(values(model), before)
    assert {name: id(p) for name, p in model.named_parameters()} == objects


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_what_save_pretrained_wrote_is_loaded_bit_for_bit(
    name: str, dtype: torch.dtype, max_shard_size: str, tmp_path: Path
) -> None:
    saved, model = MODELS[name](seed=1, dtype=dtype), MODELS[name](seed=2, dtype=dtype)
    saved.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    report = stillframe.load_hf(tmp_path, model)
    assert_same(values(model), values(saved))
    assert report == type(report)(bytes_read=saved_bytes(saved), missing=(), unexpected=())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects, "in place"
    assert not hasattr(model, "_weight_conversions"), "how the model is saved is left alone"


def test_only_the_bytes_of_the_weights_are_read_from_disk(tmp_path: Path) -> None:
    saved = tiny_qwen3_moe(seed=1)
    saved.save_pretrained(tmp_path)
    model = tiny_qwen3_moe(seed=2)
    headers = (tmp_path / WEIGHTS).stat().st_size - saved_bytes(saved)
    before = _bytes_read_by_this_process()
    report = stillframe.load_hf(tmp_path, model)
    # What counting itself reads, and the little that Python may read meanwhile, is far below a second reading.
    assert saved_bytes(saved) + headers <= _bytes_read_by_this_process() - before < 1.1 * saved_bytes(saved) + headers
    assert report.bytes_read == saved_bytes(saved)


def _bytes_read_by_this_process() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


FORMS = ("per expert", "fused", "reloaded")


def moe_in_form(form: str, directory: Path) -> PreTrainedModel:
    """A Qwen3-MoE with the weights of seed 1, saved to `directory` in one of the forms that Transformers loads."""
    model = tiny_qwen3_moe(seed=1)
    directory.mkdir()
    model.save_pretrained(directory)
    if form == "per expert":
        assert any(".experts.3.up_proj.weight" in name for name in load_file(directory / WEIGHTS))
        return model
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / WEIGHTS)
    loaded = type(model).from_pretrained(directory)
    if form == "reloaded":
        loaded.save_pretrained(directory)
    assert not any(".experts.3.up_proj.weight" in name for name in load_file(directory / WEIGHTS))
    return loaded


@pytest.mark.parametrize("origin", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_any_form_is_loaded_into_a_model_of_any_origin(form: str, origin: str, tmp_path: Path) -> None:
    expected = values(moe_in_form(form, tmp_path / "form"))
    model = moe_in_form(origin, tmp_path / "origin")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    stillframe.load_hf(tmp_path / "form", model)
    assert_same(values(model), expected)


def to_hub_layout(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensors[name].transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_are_transposed_on_the_hub_are_loaded_as_from_pretrained_loads_them(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = tiny_qwen3_vl_moe(seed=1)
    saved.save_pretrained(tmp_path)
    edit(tmp_path, to_hub_layout)
    model = tiny_qwen3_vl_moe(seed=2, dtype=dtype)
    report = stillframe.load_hf(tmp_path, model)
    assert_same(values(model), values(type(saved).from_pretrained(tmp_path, dtype=dtype).train()))
    assert report.bytes_read == saved_bytes(saved)


def test_large_transposed_experts_are_one_run_each_not_one_per_element() -> None:
    with torch.device("meta"):
        model = tiny_qwen3_vl_moe()
        experts = model.model.language_model.layers[0].mlp.experts
        experts.gate_up_proj = nn.Parameter(torch.empty(128, 1536, 2048))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    stored = StoredTensor(name=name, dtype=torch.bfloat16, shape=(128, 2048, 1536), file_offset=0, length_bytes=0)
    keys = load_keys(model, model.state_dict(keep_vars=True), {name: stored})
    (source,) = (keys.sources[index] for index in keys.tensors[name].source.tolist())
    assert source.permutation == Permutation(offset=0, shape=(128, 1536, 2048), stride=(2048 * 1536, 1, 1536))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
)
def test_other_floating_point_dtypes_are_cast_as_copy_casts(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    saved, model = tiny_qwen3_moe(seed=1, dtype=stored), tiny_qwen3_moe(seed=2, dtype=wanted)
    saved.save_pretrained(tmp_path)
    stillframe.load_hf(tmp_path, model)
    cast = {name: tensor.to(model.state_dict()[name].dtype) for name, tensor in saved.state_dict().items()}
    assert_same(dict(model.state_dict()), cast)


def test_tensors_of_several_dtypes_that_are_joined_are_each_cast(tmp_path: Path) -> None:
    saved, model = tiny_qwen3_moe(seed=1), tiny_qwen3_moe(seed=2)
    saved.save_pretrained(tmp_path)

    def halve_gates(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("gate_proj.weight"):
                tensors[name] = tensors[name].to(torch.bfloat16)

    edit(tmp_path, halve_gates)
    stillframe.load_hf(tmp_path, model)
    assert_same(dict(model.state_dict()), dict(type(saved).from_pretrained(tmp_path).state_dict()))


def test_a_parameter_whose_memory_is_not_contiguous_is_filled(tmp_path: Path) -> None:
    saved, model = tiny_qwen3(seed=1), tiny_qwen3(seed=2)
    saved.save_pretrained(tmp_path)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach().t().contiguous().t())
    assert not mlp.up_proj.weight.is_contiguous()
    stillframe.load_hf(tmp_path, model)
    assert_same(values(model), values(saved))


def test_a_base_model_loads_from_a_model_with_a_head_and_the_reverse_lacks_the_head(tmp_path: Path) -> None:
    saved = tiny_qwen3(tied=False, seed=1)
    saved.save_pretrained(tmp_path / "whole")
    saved.model.save_pretrained(tmp_path / "base")
    base = tiny_qwen3(tied=False, seed=2).model
    with pytest.raises(ModelMismatch, match=r"1 keys in the files are unknown to the model: lm_head\.weight"):
        stillframe.load_hf(tmp_path / "whole", base)
    report = stillframe.load_hf(tmp_path / "whole", base, strict=False)
    assert report.unexpected == ("lm_head.weight",)
    assert_same(values(base), values(saved.model))
    whole = tiny_qwen3(tied=False, seed=3)
    head = whole.lm_head.weight.detach().clone()
    report = stillframe.load_hf(tmp_path / "base", whole, strict=False)
    assert report.missing == ("lm_head.weight",)
    assert_same(values(whole.model), values(saved.model))
    assert torch.equal(whole.lm_head.weight, head)


def test_renamings_that_the_model_was_loaded_with_are_known(tmp_path: Path) -> None:
    saved = tiny_qwen3(seed=1)
    saved.save_pretrained(tmp_path)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.", "transformer.")] = tensors.pop(name)

    edit(tmp_path, rename)
    model = type(saved).from_pretrained(tmp_path, key_mapping={"^transformer.": "model."})
    model.save_pretrained(tmp_path / "again")
    assert all(name.startswith("transformer.") for name in load_file(tmp_path / "again" / WEIGHTS))
    with torch.no_grad():
        model.model.norm.weight.zero_()
    stillframe.load_hf(tmp_path / "again", model)
    assert torch.equal(model.model.norm.weight, saved.model.norm.weight)


def test_a_model_that_was_loaded_and_then_saved_can_be_loaded_again(tmp_path: Path) -> None:
    """Saving makes Transformers rewrite the patterns that a model was loaded with, which are still its own."""
    config = Tipsv2TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    saved = Tipsv2TextModel(config)
    saved.save_pretrained(tmp_path)
    model = Tipsv2TextModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        model.embeddings.token_embedding.weight.zero_()
    stillframe.load_hf(tmp_path / "again", model)
    assert_same(values(model), values(saved))


def test_a_tied_weight_is_loaded_from_either_name_or_from_both(tmp_path: Path) -> None:
    saved = tiny_qwen3(seed=1)
    saved.save_pretrained(tmp_path)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    embedding = saved.model.embed_tokens.weight.detach().clone()
    for stored in (names[:1], names[1:], names):

        def store(tensors: dict[str, torch.Tensor], stored: tuple[str, ...] = stored) -> None:
            for name in names:
                tensors.pop(name, None)
            tensors.update({name: embedding.clone() for name in stored})

        edit(tmp_path, store)
        model = tiny_qwen3(seed=2)
        stillframe.load_hf(tmp_path, model)
        assert_same(values(model), values(saved))
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_weight_stored_with_two_values_is_refused(tmp_path: Path) -> None:
    tiny_qwen3(tied=False, seed=1).save_pretrained(tmp_path)
    model = tiny_qwen3(tied=True, seed=2)
    with (
        unchanged(model),
        pytest.raises(ModelMismatch, match=r"embed_tokens\.weight and lm_head\.weight are one tensor"),
    ):
        stillframe.load_hf(tmp_path, model)


def test_a_model_on_the_meta_device_is_refused_and_loads_once_it_has_memory(tmp_path: Path) -> None:
    saved = tiny_qwen3(seed=1)
    saved.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = type(saved)(saved.config)
    with pytest.raises(UnsupportedModel, match=r"are on the meta device .* First call model\.to_empty"):
        stillframe.load_hf(tmp_path, model)
    model.to_empty(device="cpu")
    model.tie_weights()
    stillframe.load_hf(tmp_path, model)
    model.init_weights()
    assert_same(values(model), values(saved))
    batch = tiny_batch(saved)
    assert torch.equal(model.eval()(**batch).logits, saved.eval()(**batch).logits)


def test_a_declared_tie_that_the_model_lost_is_filled_from_the_name_that_is_stored(tmp_path: Path) -> None:
    saved, model = tiny_qwen3(seed=1), tiny_qwen3(seed=2)
    saved.save_pretrained(tmp_path)
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    stillframe.load_hf(tmp_path, model)
    assert_same(values(model), values(saved))


def drop_two(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["extra.weight"] = torch.zeros(2)
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(5, 56)


def test_all_differences_are_listed_at_once_and_nothing_is_changed(tmp_path: Path) -> None:
    tiny_qwen3_moe(seed=1).save_pretrained(tmp_path)
    edit(tmp_path, drop_two)
    model = tiny_qwen3_moe(seed=2)
    with unchanged(model), pytest.raises(ModelMismatch) as caught:
        stillframe.load_hf(tmp_path, model)
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path} does not fit Qwen3MoeForCausalLM: 2 tensors of the model are not in the files"
    )
    for part in (
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "1 keys in the files are unknown to the model: extra.weight",
        "1 do not fit: model.layers.0.mlp.gate.weight has shape (5, 56) in the files, (4, 56) in the model",
    ):
        assert part in message


def test_without_strict_what_is_there_is_loaded_and_the_rest_reported(tmp_path: Path) -> None:
    saved, model = tiny_qwen3_moe(seed=1), tiny_qwen3_moe(seed=2)
    saved.save_pretrained(tmp_path)

    def drop_one_add_one(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["extra.weight"] = torch.zeros(2)

    edit(tmp_path, drop_one_add_one)
    norm = model.model.norm.weight.detach().clone()
    report = stillframe.load_hf(tmp_path, model, strict=False)
    assert (report.missing, report.unexpected) == (("model.norm.weight",), ("extra.weight",))
    assert report.bytes_read == saved_bytes(saved) - norm.nbytes
    assert_same(values(model), {**values(saved), "model.norm.weight": norm})


def test_many_differences_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    tiny_qwen3_moe(seed=1).save_pretrained(tmp_path)
    save_file({f"strange.{i}": torch.zeros(1) for i in range(1000)}, tmp_path / WEIGHTS)
    model = tiny_qwen3_moe(seed=2)
    with unchanged(model), pytest.raises(ModelMismatch, match=r"1000 keys in the files .* and 990 more") as caught:
        stillframe.load_hf(tmp_path, model)
    assert len(str(caught.value)) < 3000


def lose_an_expert(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]


def lose_all_gates(tensors: dict[str, torch.Tensor]) -> None:
    for expert in range(4):
        del tensors[f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"]


def grow_an_expert(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] = torch.zeros(25, 56)


def add_an_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.experts.4.{name}.weight"] = torch.zeros(24, 56)


def add_fused(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(4, 48, 56)


def add_without_prefix(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] = torch.zeros(56)


def make_integer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(56, dtype=torch.int64)


def make_eight_bits(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lose_an_expert,
            r"layers\.1\.mlp\.experts\.gate_up_proj cannot be made of .* 4 keys like .*gate.* 3 keys like .*up",
        ),
        (
            lose_all_gates,
            r"layers\.1\.mlp\.experts\.gate_up_proj cannot be made of .* 0 keys like .*gate.* 4 keys like .*up",
        ),
        (grow_an_expert, r"layers\.1\.mlp\.experts\.gate_up_proj cannot be made of what is stored"),
        (add_an_expert, r"layers\.1\.mlp\.experts\.gate_up_proj has shape \(5, 48, 56\) in the files"),
        (add_fused, r"gate_up_proj more than one stored key is for it: .*experts\.0\.gate_proj.* and .*gate_up_proj"),
        (add_without_prefix, r"model\.norm\.weight more than one stored key is for it: .*norm\.weight and .*norm"),
        (make_integer, r"model\.norm\.weight is torch\.int64 in the files, torch\.float32 in the model, which is not"),
        (make_eight_bits, r"experts\.gate_up_proj is torch\.float8_e4m3fn in the files, torch\.float32 in the model"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_does_not_fit_is_refused_strict_or_not(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, strict: bool, tmp_path: Path
) -> None:
    tiny_qwen3_moe(seed=1).save_pretrained(tmp_path)
    edit(tmp_path, change)
    model = tiny_qwen3_moe(seed=2)
    with unchanged(model), pytest.raises(ModelMismatch, match=message) as caught:
        stillframe.load_hf(tmp_path, model, strict=strict)
    assert "1 do not fit" in str(caught.value)
    assert "are not in the files" not in str(caught.value), "what is there and wrong is not missing as well"


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    tiny_qwen3(seed=1).save_pretrained(tmp_path)
    model = tiny_qwen3_moe(seed=2)
    with unchanged(model), pytest.raises(ModelMismatch, match="tensors of the model are not in the files"):
        stillframe.load_hf(tmp_path, model)


class Doubling(ConversionOps):
    """Values that are in no file, of all keys of a kind; on shapes alone it does what it does on values."""

    def convert(self, input_dict: dict[str, list[torch.Tensor]], **kwargs: object) -> dict[str, torch.Tensor]:
        (found,) = input_dict.values()
        return {"mlp.up_proj.weight": found[0] * 2}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class Fickle(Doubling):
    """Makes of values something else than of shapes, or nothing at all."""

    def convert(self, input_dict: dict[str, list[torch.Tensor]], **kwargs: object) -> dict[str, torch.Tensor]:
        (found,) = input_dict.values()
        if found[0].device.type == "cpu":
            if found[0].sum() > 0:
                raise ArithmeticError("values too large")
            found = [found[0][:-1]]
        return {"mlp.up_proj.weight": found[0] * 2}


def _rows_of(operation: ConversionOps, name: str = "mlp.up_proj.weight") -> WeightConverter:
    return WeightConverter(source_patterns=name, target_patterns=name, operations=[operation])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", [PermuteForRope(), Doubling()])
def test_values_that_a_conversion_computes_are_those_of_from_pretrained(
    operation: ConversionOps, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_qwen3(seed=1).save_pretrained(tmp_path)
    model = tiny_qwen3(seed=2, dtype=dtype)
    with _registered(_rows_of(operation)):
        expected = type(model).from_pretrained(tmp_path, dtype=dtype)
        report = stillframe.load_hf(tmp_path, model)
    assert_same(values(model), values(expected))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(values(expected)[name], values(tiny_qwen3(seed=1, dtype=dtype))[name]), "it is computed"
    assert report.bytes_read == sum(tensor.nbytes for tensor in tiny_qwen3(seed=1).parameters())


@pytest.mark.parametrize(("sign", "said"), [(1, "values too large"), (-1, r"makes \(\d+, 56\) of .* of their shapes")])
def test_a_conversion_that_fails_on_values_is_an_error_that_names_the_tensor(
    sign: int, said: str, tmp_path: Path
) -> None:
    tiny_qwen3(seed=1).save_pretrained(tmp_path)

    def signed(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.abs() * sign

    edit(tmp_path, signed)
    model = tiny_qwen3(seed=2)
    with _registered(_rows_of(Fickle())), pytest.raises(LoadError, match=rf"layers\.\d\.mlp\.up_proj\.weight.*{said}"):
        stillframe.load_hf(tmp_path, model)


@contextmanager
def _registered(converter: WeightConverter) -> Iterator[None]:
    """The conversion as one of Transformers' own for Qwen3, while the context lasts."""
    conversion_mapping.register_checkpoint_conversion_mapping("qwen3", [converter])
    try:
        yield
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache.pop("qwen3")
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("qwen3")


def test_a_tensor_that_is_stored_alone_and_as_a_part_of_another_is_refused(tmp_path: Path) -> None:
    saved = tiny_qwen3(seed=1)
    saved.save_pretrained(tmp_path)

    def join(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            prefix = f"model.layers.{layer}.self_attn"
            key = tensors.pop(f"{prefix}.k_proj.weight")
            tensors[f"{prefix}.kv_proj.weight"] = torch.cat([key, tensors.pop(f"{prefix}.v_proj.weight")])

    edit(tmp_path, join)
    chunk = WeightConverter(
        source_patterns="self_attn.kv_proj",
        target_patterns=["self_attn.k_proj", "self_attn.v_proj"],
        operations=[Chunk(dim=0)],
    )
    with _registered(chunk):
        model = tiny_qwen3(seed=2)
        stillframe.load_hf(tmp_path, model)
        assert_same(values(model), values(saved))
        edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.v_proj.weight": torch.zeros(32, 56)}))
        with unchanged(model), pytest.raises(ModelMismatch, match=r"v_proj\.weight more than one group of stored keys"):
            stillframe.load_hf(tmp_path, model)


def test_a_name_that_only_looks_like_an_old_one_is_not_renamed(tmp_path: Path) -> None:
    class Old(nn.Module):
        """Transformers renames LayerNorm.gamma, of TensorFlow's days, to LayerNorm.weight; unless the model has it."""

        def __init__(self, value: float) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.full((3,), value))

    saved, model = tiny_qwen3(seed=1), tiny_qwen3(seed=2)
    for one, value in ((saved, 1.0), (model, 2.0)):
        one.model.LayerNorm = Old(value)
    saved.save_pretrained(tmp_path)
    stillframe.load_hf(tmp_path, model)
    assert_same(values(model), values(saved))


def test_modules_that_are_no_transformers_model_are_refused_without_a_mapping(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    refusal = r"Linear is not a transformers PreTrainedModel.*key_mapping=\{\}"
    with unchanged(model), pytest.raises(UnsupportedModel, match=refusal):
        stillframe.load_hf(tmp_path, model)


def tied_linears() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    model["b"].weight = model["a"].weight
    return model


def stored(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, directory / WEIGHTS)
    return directory


def test_all_differences_from_any_module_are_listed_at_once(tmp_path: Path) -> None:
    tensors = {"c.bias": torch.zeros(3), "a.bias": torch.ones(3), "c.weight": torch.zeros(2, 3), "d": torch.ones(1)}
    model = tied_linears()
    with unchanged(model), pytest.raises(ModelMismatch) as caught:
        stillframe.load_hf(stored(tmp_path, tensors), model, key_mapping={"^a": "c"})
    # The mapping has another place for a.bias than the one that the file has.
    assert "1 tensors of the model are not in the files: b.bias" in str(caught.value)
    assert "2 keys in the files are unknown to the model: a.bias, d" in str(caught.value)
    assert "a.weight has shape (2, 3) in the files, (3, 2) in the model" in str(caught.value)
    assert torch.equal(model["a"].weight, model["b"].weight)


@pytest.mark.parametrize("names", [["c.weight"], ["b.weight"], ["b.weight", "c.weight"]])
def test_a_tied_weight_of_any_module_is_loaded_from_either_name_or_from_both(names: list[str], tmp_path: Path) -> None:
    biases = {"c.bias": torch.zeros(3), "b.bias": torch.ones(3)}
    weight = torch.arange(6.0).reshape(3, 2)
    model = tied_linears()
    stillframe.load_hf(
        stored(tmp_path, biases | {name: weight.clone() for name in names}), model, key_mapping={"^a": "c"}
    )
    assert model["a"].weight is model["b"].weight
    assert torch.equal(model["a"].weight, weight)
    assert torch.equal(model["b"].bias, biases["b.bias"])


def test_a_tied_weight_of_any_module_stored_with_two_values_is_refused(tmp_path: Path) -> None:
    biases = {"a.bias": torch.zeros(3), "b.bias": torch.ones(3)}
    both = {"a.weight": torch.zeros(3, 2), "b.weight": torch.ones(3, 2)}
    model = tied_linears()
    with unchanged(model), pytest.raises(ModelMismatch, match=r"a\.weight and b\.weight are one tensor in the model"):
        stillframe.load_hf(stored(tmp_path, biases | both), model, key_mapping={})


@pytest.mark.parametrize("form", FORMS)
def test_a_mapping_is_undone_before_the_conversions_of_transformers(form: str, tmp_path: Path) -> None:
    expected = values(moe_in_form(form, tmp_path / "form"))

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.", "decoder.")] = tensors.pop(name)

    edit(tmp_path / "form", rename)
    model = tiny_qwen3_moe(seed=2)
    stillframe.load_hf(tmp_path / "form", model, key_mapping={r"^model\.": "decoder."})
    assert_same(values(model), expected)
    with pytest.raises(ModelMismatch, match="keys in the files are unknown to the model: decoder"):
        stillframe.load_hf(tmp_path / "form", model)


def test_a_mapping_that_is_none_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"key_mapping has '\(': 'x', which re\.sub refuses"):
        stillframe.load_hf(tmp_path / "absent", nn.Linear(2, 2), key_mapping={"(": "x"})


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"^[ab]": "c"}, r"key_mapping gives 'a\.weight' and 'b\.weight' one key, 'c\.weight'"),
        ({r"^b\.bias$": ""}, r"key_mapping leaves 'b\.bias' without a key"),
    ],
)
def test_a_mapping_that_would_lose_a_tensor_is_refused(rules: dict[str, str], said: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    directory = stored(tmp_path, {"c.weight": torch.zeros(3, 2), "c.bias": torch.zeros(3)})
    with unchanged(model), pytest.raises(UnsupportedModel, match=said):
        stillframe.load_hf(directory, model, key_mapping=rules)


def test_wrappers_inside_a_model_make_no_difference(tmp_path: Path) -> None:
    saved, model = tiny_qwen3_vl_moe(seed=1), tiny_qwen3_vl_moe(seed=2)
    saved.save_pretrained(tmp_path)
    edit(tmp_path, to_hub_layout)
    stillframe.load_hf(tmp_path, model)
    wrapped: Any = tiny_qwen3_vl_moe(seed=3)
    wrapped.model.visual = torch.compile(wrapped.model.visual, backend="eager")
    wrapped.model.language_model.layers[1] = checkpoint_wrapper(wrapped.model.language_model.layers[1])
    stillframe.load_hf(tmp_path, wrapped)
    assert_same({clean_name(name): tensor for name, tensor in values(wrapped).items()}, values(model))


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_a_truncated_file_is_refused_before_anything_is_changed(max_shard_size: str, tmp_path: Path) -> None:
    tiny_qwen3_moe(seed=1).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-5])
    model = tiny_qwen3_moe(seed=2)
    with unchanged(model), pytest.raises(CorruptCheckpoint, match=re.escape(last.name)):
        stillframe.load_hf(tmp_path, model)


def test_a_directory_that_does_not_exist_changes_nothing(tmp_path: Path) -> None:
    model = tiny_qwen3(seed=2)
    with unchanged(model), pytest.raises(NotACheckpoint, match="hf-latest: does not exist"):
        stillframe.load_hf(tmp_path / "hf-latest", model)


def test_keys_that_transformers_ignores_for_a_model_are_neither_missing_nor_unexpected(tmp_path: Path) -> None:
    saved = tiny_qwen3(seed=1)
    saved.save_pretrained(tmp_path)

    def age(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # stored by old versions
        tensors["vision.weight"] = torch.ones(8)
        del tensors["model.norm.weight"]

    edit(tmp_path, age)
    model = tiny_qwen3(seed=2)
    model._keys_to_ignore_on_load_unexpected = {r"^vision\."}
    model._keys_to_ignore_on_load_missing = {r"norm\.weight$"}
    report = stillframe.load_hf(tmp_path, model)
    assert (report.missing, report.unexpected) == ((), ())


def test_what_a_save_leaves_out_is_not_missing(tmp_path: Path) -> None:
    saved, model = tiny_qwen3(seed=1), tiny_qwen3(seed=2)
    for one in (saved, model):
        one._keys_to_ignore_on_save = {"model.norm.weight"}
    saved.save_pretrained(tmp_path)
    norm = model.model.norm.weight.detach().clone()
    stillframe.load_hf(tmp_path, model)
    assert torch.equal(model.model.norm.weight, norm)


def test_buffers_are_loaded_with_their_own_dtypes(tmp_path: Path) -> None:
    saved, model = tiny_qwen3(seed=1, dtype=torch.bfloat16), tiny_qwen3(seed=2, dtype=torch.bfloat16)
    for one, count in ((saved, 7), (model, 0)):
        one.model.register_buffer("steps", torch.tensor(count))
        one.model.register_buffer("mask", torch.tensor([True, False]) if count else torch.zeros(2, dtype=torch.bool))
        one.model.register_buffer("scratch", torch.full((2,), float(count)), persistent=False)
    saved.save_pretrained(tmp_path)
    stillframe.load_hf(tmp_path, model)
    assert model.model.steps.item() == 7
    assert model.model.mask.tolist() == [True, False]
    assert model.model.scratch.tolist() == [0.0, 0.0]


def test_a_string_and_a_relative_path_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, model = tiny_qwen3(seed=1), tiny_qwen3(seed=2)
    saved.save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    stillframe.load_hf("m", model)
    assert_same(values(model), values(saved))


def test_the_index_may_be_in_any_order_and_have_no_metadata(tmp_path: Path) -> None:
    saved, model = tiny_qwen3(seed=1), tiny_qwen3(seed=2)
    saved.save_pretrained(tmp_path, max_shard_size="50KB")
    index_path = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index_path.read_text())["weight_map"]
    index_path.write_text(json.dumps({"weight_map": dict(reversed(weight_map.items()))}))
    stillframe.load_hf(tmp_path, model)
    assert_same(values(model), values(saved))
