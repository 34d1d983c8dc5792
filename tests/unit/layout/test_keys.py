"""Traced keys against the values that Transformers' own conversion makes; and what is refused instead of guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    revert_weight_conversion,
)

from stillframe.errors import UnsupportedModel
from stillframe.layout.computing import Conversion
from stillframe.layout.keys import Key, KeyMap, save_keys
from stillframe.layout.runtime import runtime_tensors
from stillframe.layout.tracing import Tracer
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe, tiny_qwen3_vl_moe

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3 tied": tiny_qwen3,
    "qwen3 untied": lambda: tiny_qwen3(tied=False),
    "qwen3_moe": tiny_qwen3_moe,
    "qwen3_vl_moe": tiny_qwen3_vl_moe,
}


def assemble(key: Key, key_map: KeyMap, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value of a key, put together from its runs."""
    flat = torch.empty(key.runs.length.sum().item(), dtype=key.dtype)
    for start, source, source_start, length in zip(
        *(c.tolist() for c in (key.runs.start, key.runs.source, key.runs.source_start, key.runs.length)), strict=True
    ):
        origin = tensors[key_map.sources[source]].detach()
        origin = (origin if key.dims is None else origin.permute(key.dims)).reshape(-1)
        flat[start : start + length] = origin[source_start : source_start + length]
    return flat.reshape(key.shape)


def assert_reproduces(model: PreTrainedModel) -> KeyMap:
    tensors = runtime_tensors(model)
    key_map = save_keys(model, tensors)
    expected = revert_weight_conversion(model, dict(tensors))
    assert [key.name for key in key_map.keys] == list(expected)
    for key in key_map.keys:
        assert key.runs.covers(expected[key.name].numel()), key.name
        assert key.shape == tuple(expected[key.name].shape)
        assert key.dtype == expected[key.name].dtype
        assert torch.equal(assemble(key, key_map, tensors), expected[key.name]), key.name
    return key_map


def assert_blocks(key_map: KeyMap, model: PreTrainedModel) -> None:
    """Keys are in one block where transformers has them in one storage, also after its copies."""
    expected = revert_weight_conversion(model, dict(runtime_tensors(model)))
    storages = {name: tensor.untyped_storage() for name, tensor in expected.items()}
    assert {key.name: key.block_bytes for key in key_map.keys} == {n: s.nbytes() for n, s in storages.items()}
    blocks = {(key.block, storages[key.name].data_ptr()) for key in key_map.keys}
    assert len(blocks) == len({block for block, _ in blocks}) == len({place for _, place in blocks})


@pytest.mark.parametrize("name", MODELS)
def test_keys_of_a_model_from_config_are_what_transformers_would_save(name: str) -> None:
    model = MODELS[name]()
    assert_blocks(assert_reproduces(model), model)


@pytest.mark.parametrize("name", MODELS)
def test_keys_of_a_reloaded_model_are_what_transformers_would_save(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    assert_reproduces(type(model).from_pretrained(tmp_path))


def test_experts_are_fused_in_the_model_and_apart_in_the_keys() -> None:
    key_map = assert_reproduces(tiny_qwen3_moe())
    keys = {key.name: key for key in key_map.keys}
    up = keys["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert [key_map.sources[s] for s in up.runs.source.tolist()] == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert len(up.runs) == 1
    assert not any("gate_up_proj" in name for name in keys)


def with_conversions(*conversions: WeightTransform, model: PreTrainedModel | None = None) -> PreTrainedModel:
    """A model as if `from_pretrained` had applied `conversions` when it was loaded; a save reverts them."""
    model = model or tiny_qwen3(tied=False)
    model._weight_conversions = list(conversions)
    return model


def test_one_parameter_split_into_several_keys_and_several_joined_into_one() -> None:
    joined = WeightConverter(
        source_patterns="self_attn.qkv_proj",
        target_patterns=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        operations=[Chunk(dim=1)],
    )
    split = WeightConverter(
        source_patterns=["mlp.down_left", "mlp.down_right"],
        target_patterns="mlp.down_proj",
        operations=[Concatenate(dim=1)],
    )
    model = with_conversions(joined, split)
    for layer in model.model.layers:  # equal shapes, so that they can be joined along the second dimension
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, nn.Linear(10, 6, bias=False))
    key_map = assert_reproduces(model)
    assert_blocks(key_map, model)
    keys = {key.name: key for key in key_map.keys}
    assert keys["model.layers.0.self_attn.qkv_proj.weight"].shape == (6, 30)
    assert keys["model.layers.0.mlp.down_right.weight"].shape == (56, 40)


class _Operation(ConversionOps):
    """What a test gives it, under the name of the target."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.change = change

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: self.change(tensors[0] if isinstance(tensors, list) else tensors)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def converter(change: Callable[[torch.Tensor], torch.Tensor]) -> WeightConverter:
    return WeightConverter(
        source_patterns="mlp.w", target_patterns="mlp.down_proj.weight", operations=[_Operation(change)]
    )


def changing(change: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    return with_conversions(converter(change))


def join_then_scale(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor]).mul_(2)


@pytest.mark.parametrize("change", [lambda t: t.mul_(2), lambda t: t[:4].add_(1)])
def test_a_conversion_that_changes_the_model_is_refused_by_name(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = changing(change)
    with pytest.raises(UnsupportedModel, match=r"changes tensors in place: model\.layers\.0\.mlp\.down_proj\.weight"):
        save_keys(model, runtime_tensors(model))


COMPUTING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scaled": lambda t: t * 2,
    "joined, then scaled": join_then_scale,
    "copied, then scaled": lambda t: t.t().contiguous().mul_(2),
    "bytes of a join": lambda t: torch.cat([t, t]).view(torch.int32),
    "a join of two dtypes": lambda t: torch.cat([t, t.to(torch.float64)]),
    "other bytes": lambda t: t.view(torch.int32),
    "cast": lambda t: t.to(torch.bfloat16),
    "forgotten": lambda t: torch.zeros_like(t),
    "twice": lambda t: torch.hstack([t, t]),
    "written into": lambda t: torch.zeros(3, *t.shape, device=t.device).index_copy_(
        0, torch.tensor([1], device=t.device), t[None]
    ),
    "assigned": lambda t: _assigned(t),
}


def _assigned(tensor: torch.Tensor) -> torch.Tensor:
    result = torch.ones(tensor.shape[0] + 1, tensor.shape[1], device=tensor.device)
    result[1:] = tensor
    return result


@pytest.mark.parametrize("name", COMPUTING)
def test_of_what_a_conversion_computes_the_tensors_are_known_and_the_values_can_be_made(name: str) -> None:
    model = changing(COMPUTING[name])
    tensors = runtime_tensors(model)
    key_map = save_keys(model, tensors)
    expected = revert_weight_conversion(model, dict(tensors))
    computed = [key for key in key_map.keys if key.made_of]
    assert [key.name for key in computed] == [f"model.layers.{i}.mlp.w" for i in range(3)]
    for key in computed:
        (source,) = (key_map.sources[index] for index in key.made_of)
        assert source == key.name.replace("mlp.w", "mlp.down_proj.weight")
        own = key_map.sources[int(key.runs.source[0])]
        made = Conversion(model, hub_layout=False).compute({source: tensors[source]}, {own: key.dtype})[own]
        assert (made.shape, made.dtype) == (key.shape, key.dtype)
        assert torch.equal(made, expected[key.name])


def test_what_is_computed_of_nothing_is_refused_by_name() -> None:
    model = changing(lambda t: torch.zeros(2, device=t.device))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mlp\.w is not made of renames, slices"):
        save_keys(model, runtime_tensors(model))


def test_interleaving_is_computed_as_it_gathers_single_elements_into_a_copy() -> None:
    model = with_conversions(
        WeightConverter(source_patterns="mlp.w", target_patterns="mlp.down_proj", operations=[Interleave(dim=0)])
    )
    assert [key.name for key in save_keys(model, runtime_tensors(model)).keys if key.made_of] == [
        f"model.layers.{i}.mlp.w.weight" for i in range(3)
    ]


def test_a_transposed_tensor_is_one_run_of_it_in_another_order_whatever_its_size() -> None:
    model = changing(lambda t: t.transpose(0, 1).contiguous())
    assert [key.dims for key in assert_reproduces(model).keys if key.dims is not None] == [(1, 0)] * 3
    with torch.device("meta"):
        model.model.layers[0].mlp.down_proj = nn.Linear(100_000, 100_000, bias=False)
    turned, *_ = [key for key in save_keys(model, runtime_tensors(model)).keys if key.dims is not None]
    assert (turned.name, turned.dims, len(turned.runs)) == ("model.layers.0.mlp.w", (1, 0), 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.transpose(0, 1)[1:].contiguous(),
        lambda t: torch.cat([t, t]).t().contiguous(),
        lambda t: t.transpose(0, 1).contiguous()[:, 1:],
    ],
)
def test_a_part_or_a_join_that_is_transposed_is_traced_element_by_element(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    tracer = Tracer({"a": torch.empty(8, 6, device="meta")})
    values = torch.arange(48.0).view(8, 6)
    output = tracer.run(lambda tensors: {"turned": change(tensors["a"])})["turned"]
    assert tracer.turned(output) is None
    (runs,) = tracer.runs_of_each({"turned": output})
    found = torch.cat([values.view(-1)[s : s + n] for s, n in zip(runs.source_start, runs.length, strict=True)])
    assert torch.equal(found, change(values).reshape(-1))


def test_a_large_join_that_is_transposed_is_refused_before_it_fills_the_memory() -> None:
    tracer = Tracer({"a": torch.empty(4000, 4000, device="meta")})
    output = tracer.run(lambda tensors: {"joined": torch.cat([tensors["a"], tensors["a"]]).t()})["joined"]
    with pytest.raises(UnsupportedModel, match=r"joined is a transposed tensor, of shape \(4000, 8000\)"):
        tracer.runs_of("joined", output)


JOINS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cat first": lambda a, b: torch.cat([a, b]),
    "cat middle, by keyword": lambda a, b: torch.cat(tensors=[a, b, a], dim=1),
    "cat last, from the end": lambda a, b: torch.concat((b, a), -1),
    "cat by axis": lambda a, b: torch.cat([a, b], axis=2),
    "cat with empty ones": lambda a, b: torch.cat([torch.empty(0, device="meta"), a, b[:0], b], 0),
    "cat of parts": lambda a, b: torch.cat([a[:, 1:], b[:, :1]], 1),
    "stack first": lambda a, b: torch.stack([a, b]),
    "stack last": lambda a, b: torch.stack([a, b], dim=-1),
    "stack inside": lambda a, b: torch.stack([a, b], 2),
    "stack of cats, sliced": lambda a, b: torch.stack([torch.cat([a, b], 1), torch.cat([b, a], 1)], 1)[1:, :, 1:-1],
    "cat of one cat twice": lambda a, b: torch.cat([torch.cat([a, b], 2)] * 2, 1),
    "split and joined again": lambda a, b: torch.cat([*torch.chunk(a, 2, dim=2), *b.unbind(1)[:1]][:2], 0),
    "narrow, squeeze, view": lambda a, b: a.narrow(0, 1, 1).squeeze(0).view(-1)[3:7],
    "copies of parts": lambda a, b: torch.cat([a[:, 1:].contiguous(), b.transpose(0, 1).contiguous()[:2]], 1),
    "copy of a copy, sliced": lambda a, b: a[:, :2].contiguous()[:, 1:].contiguous()[1],
    "copy of nothing new": lambda a, b: a.contiguous()[1].contiguous(),
    "transposed join": lambda a, b: torch.cat([a, b], 1).permute(2, 0, 1),
    "nothing": lambda a, b: torch.cat([a[:0], b[:0]]),
}


@pytest.mark.parametrize("name", JOINS)
def test_the_tracer_follows_views_and_joins(name: str) -> None:
    inputs = {"a": torch.empty(2, 3, 4, device="meta"), "b": torch.empty(2, 3, 4, device="meta")}
    tracer = Tracer(inputs)
    output = tracer.run(lambda tensors: {"joined": JOINS[name](tensors["a"], tensors["b"])})["joined"]
    runs = tracer.runs_of("joined", output)
    (together,) = tracer.runs_of_each({"joined": output})
    for column in ("start", "source", "source_start", "length"):
        assert getattr(runs, column).tolist() == getattr(together, column).tolist()
    values = [torch.arange(24.0).reshape(2, 3, 4), torch.arange(100.0, 124.0).reshape(2, 3, 4)]
    with torch.device("cpu"):
        expected = JOINS[name](*values) if "empty" not in name else torch.cat(values)
    assert runs.covers(expected.numel())
    found = torch.full((expected.numel(),), -1.0)
    for start, source, source_start, length in zip(
        *(c.tolist() for c in (runs.start, runs.source, runs.source_start, runs.length)), strict=True
    ):
        found[start : start + length] = values[source].reshape(-1)[source_start : source_start + length]
    assert torch.equal(found, expected.reshape(-1))


def test_tensors_beside_each_other_in_one_storage_are_not_refused() -> None:
    model = tiny_qwen3()
    mlp = model.model.layers[0].mlp
    rows, columns = mlp.up_proj.weight.shape
    both = torch.randn(2 * rows, columns)
    mlp.up_proj.weight = nn.Parameter(both[:rows])
    mlp.gate_proj.weight = nn.Parameter(both[rows:])
    assert_reproduces(model)


def test_a_parameter_with_transposed_memory_is_saved_in_the_order_of_its_elements() -> None:
    model = tiny_qwen3()
    mlp = model.model.layers[0].mlp
    rows, columns = mlp.up_proj.weight.shape
    mlp.up_proj.weight = nn.Parameter(torch.randn(columns, rows).t())
    assert_reproduces(model)


def test_a_part_of_a_parameter_with_transposed_memory_is_made_of_the_whole() -> None:
    model = changing(lambda t: t[:4])
    mlp = model.model.layers[1].mlp
    rows, columns = mlp.down_proj.weight.shape
    mlp.down_proj.weight = nn.Parameter(torch.randn(columns, rows).t())
    with pytest.raises(UnsupportedModel, match=r"do not save each element of model\.layers\.0\.mlp\.down_proj"):
        save_keys(model, runtime_tensors(model))
    model = changing(lambda t: torch.cat([t[:4], t[4:]]))
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.randn(columns, rows).t())
    computed = [key.name for key in save_keys(model, runtime_tensors(model)).keys if key.made_of]
    assert computed == ["model.layers.1.mlp.w"]


@pytest.mark.parametrize(
    ("conversions", "lost"),
    [
        ([WeightRenaming("mlp.both", f"mlp.{name}_proj") for name in ("gate", "up")], r"layers\.0\.mlp\.up_proj"),
        ([converter(lambda t: t[1:])], r"layers\.0\.mlp\.down_proj"),
        ([converter(lambda t: torch.cat([t, t[:1]]))], r"layers\.0\.mlp\.down_proj"),
        ([converter(lambda t: torch.cat([t[1:], t[1:2]]))], r"layers\.0\.mlp\.down_proj"),
    ],
    ids=["two tensors, one key", "a row left out", "a row twice", "one for another"],
)
def test_a_conversion_that_loses_or_doubles_elements_is_refused(conversions: list[WeightTransform], lost: str) -> None:
    model = with_conversions(*conversions)
    with pytest.raises(UnsupportedModel, match=rf"do not save each element of model\.{lost}\.weight, .* exactly once"):
        save_keys(model, runtime_tensors(model))


def test_renames_alone_keep_every_value() -> None:
    model = with_conversions(WeightRenaming("text_model.", "model."))
    assert {key.name.split(".")[0] for key in assert_reproduces(model).keys} == {"text_model", "lm_head"}
