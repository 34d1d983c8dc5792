"""What is saved in fp8 and what is left alone, the names in config.json, and the blocks that ranks share."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3NextConfig

from stillframe.errors import UnsupportedModel
from stillframe.layout.casting import Cast
from stillframe.layout.huggingface import HuggingFacePlan, plan_huggingface
from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.placement import Holdings
from stillframe.layout.quantizing import held_blocks
from stillframe.layout.renaming import KeyMapping
from stillframe.layout.runs import Runs
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe, tiny_qwen3_vl_moe
from stillframe.testing.playing import playing


def fp8(*but: str, keep: tuple[str, ...] = ()) -> Cast:
    patterns = tuple(re.compile(pattern) for pattern in but)
    return Cast(dtype=torch.bfloat16, keep=tuple(re.compile(p) for p in keep), fp8_but=patterns)


def plan(model: nn.Module, cast: Cast, *, rank: int = 0, world_size: int = 1, **options: Any) -> HuggingFacePlan:
    options = {"max_shard_bytes": 10**9, **options}
    return plan_huggingface(model, cast=cast, rank=rank, world_size=world_size, plan_id=1, **options)


def in_fp8(found: HuggingFacePlan) -> set[str]:
    assert found.blocks is not None
    names = {item.name for file in found.layout.files for item in file.items}
    scales = {name.removesuffix("_scale_inv") for name in names if name.endswith("_scale_inv")}
    assert scales == set(found.blocks.matrices)  # of a plan of one rank, which holds everything
    return scales


def test_linear_layers_are_quantized_and_nothing_else() -> None:
    found = plan(tiny_qwen3(tied=True), fp8())
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert in_fp8(found) == {f"model.layers.{i}.{name}.weight" for i in range(3) for name in names}
    assert found.left_alone == ("lm_head", "model.embed_tokens", "model.norm")
    assert found.config_dtype == torch.bfloat16


def test_experts_are_quantized_one_by_one_and_routers_are_not() -> None:
    found = plan(tiny_qwen3_moe(), fp8())
    experts = {
        f"model.layers.{i}.mlp.experts.{e}.{n}_proj.weight"
        for i in range(3)
        for e in range(4)
        for n in ("gate", "up", "down")
    }
    assert experts < in_fp8(found)
    assert found.left_alone == ("lm_head", "model.embed_tokens", *(f"model.layers.{i}.mlp.gate" for i in range(3)))


def test_routers_that_are_linear_layers_are_left_alone() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    config = Qwen3NextConfig(
        **sizes, num_key_value_heads=2, num_experts=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model.model.layers[0].mlp.shared_expert_gate, nn.Linear)
    found = plan(model, fp8())
    assert "model.layers.0.mlp.shared_expert.gate_proj.weight" in in_fp8(found)
    assert "model.layers.0.mlp.shared_expert_gate.weight" not in in_fp8(found)
    assert {"model.layers.0.mlp.shared_expert_gate", "model.layers.0.mlp.gate"} <= set(found.left_alone or ())


def test_experts_that_stay_fused_are_left_alone_by_one_name() -> None:
    found = plan(tiny_qwen3_vl_moe(), fp8())
    assert not any("experts" in name for name in in_fp8(found))
    assert "model.language_model.layers.1.mlp.experts" in (found.left_alone or ())
    assert not any("experts." in name for name in found.left_alone or ())


def test_what_a_pattern_names_stays_as_it_says() -> None:
    cast = fp8(r"layers\.0\.", r"layers\.1\.mlp\.experts", r"layers\.2\.mlp\.experts\.3\.", keep=("q_proj",))
    found = plan(tiny_qwen3_moe(), cast)
    names = in_fp8(found)
    assert not any("layers.0." in name or "q_proj" in name or "layers.1.mlp.experts" in name for name in names)
    assert "model.layers.2.mlp.experts.2.up_proj.weight" in names
    left = set(found.left_alone or ())
    assert {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts", "model.layers.1.self_attn.q_proj"} <= left
    # Of the third layer's some are quantized: not all of them may be named.
    assert {f"model.layers.2.mlp.experts.3.{n}_proj" for n in ("gate", "up", "down")} <= left
    assert "model.layers.2.mlp.experts" not in left


def test_modules_that_transformers_keeps_in_float32_are_left_alone() -> None:
    model = tiny_qwen3()
    model._keep_in_fp32_modules = {"o_proj"}
    model._keep_in_fp32_modules_strict = {"self_attn.*v_proj"}
    assert not any("o_proj" in name or "v_proj" in name for name in in_fp8(plan(model, fp8())))


def test_names_follow_a_key_mapping() -> None:
    mapping = KeyMapping(rules=((re.compile(r"^model\.layers\."), "blocks."),))
    found = plan(tiny_qwen3_moe(), fp8(r"^blocks\.0\."), key_mapping=mapping)
    assert "blocks.1.self_attn.q_proj.weight" in in_fp8(found)
    assert "blocks.0.mlp.experts" in (found.left_alone or ())
    assert not any(name.startswith("blocks.0.") for name in in_fp8(found))


def test_a_weight_and_its_scales_are_in_one_file_and_counted() -> None:
    found = plan(tiny_qwen3_moe(), fp8(), max_shard_bytes=20_000)
    assert len(found.layout.files) > 5
    for file in found.layout.files:
        names = {item.name for item in file.items}
        assert {n + "_scale_inv" for n in names if n + "_scale_inv" in in_fp8(found)} <= names
        assert {n.removesuffix("_scale_inv") for n in names} <= names
    (index,) = found.layout.inline_files
    total = sum(item.length_bytes for file in found.layout.files for item in file.items if item.name)
    assert f'"total_size": {total}'.encode() in index.content


def test_what_has_no_config_or_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"save_dtype='fp8' needs a config\.json"):
        plan(nn.Linear(4, 4), fp8(), key_mapping=KeyMapping(rules=()))
    with pytest.raises(UnsupportedModel, match="no linear layer"):
        plan(tiny_qwen3(), fp8("."))
    model = tiny_qwen3()
    model.model.layers[1].mlp.up_proj.register_buffer("weight_scale_inv", torch.ones(1))
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj\.weight_scale_inv"):
        plan(model, fp8())


@pytest.mark.parametrize(("world_size", "shared"), [(1, ()), (2, ((0, 3, 0),))])
def test_a_key_made_of_columns_of_two_tensors_shares_all_its_blocks(world_size: int, shared: object) -> None:
    runs = Runs.of([(200 * row + 100 * s, s, 100 * row, 100) for row in range(300) for s in (0, 1)])
    key = Key(
        name="k.weight",
        dtype=torch.float8_e4m3fn,
        shape=(300, 200),
        runs=runs,
        block=0,
        block_bytes=1,
        matrix="k.weight",
    )
    with playing(0, world_size):
        mesh = init_device_mesh("cpu", (world_size,))
        tensors = {name: distribute_tensor(torch.zeros(300, 100), mesh, [Shard(0)]) for name in "ab"}
        held = Holdings(rank=0, world_size=world_size)
        holdings = {name: held.of(name, tensor, is_parameter=True) for name, tensor in tensors.items()}
        blocks = held_blocks(KeyMap(sources=("a", "b"), keys=(key,)), tensors, held, holdings)
    assert blocks.matrices["k.weight"].shared == shared
    assert blocks.shared_count == (0 if world_size == 1 else 3 * 2)
    patches = [(p.tensor, p.row, p.rows, p.column, p.columns) for p in blocks.matrices["k.weight"].patches]
    rows = 300 // world_size
    assert sum(p[2] * p[4] for p in patches) == rows * 200
    assert {p[0]: p[3] for p in patches} == {"a": 0, "b": 100}


def test_a_key_made_of_rows_of_two_tensors_shares_where_they_meet() -> None:
    runs = Runs.of([(0, 0, 0, 300 * 10), (300 * 10, 1, 0, 128 * 10)])
    key = Key(
        name="k.weight",
        dtype=torch.float8_e4m3fn,
        shape=(428, 10),
        runs=runs,
        block=0,
        block_bytes=1,
        matrix="k.weight",
    )
    with playing(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        tensors = {n: distribute_tensor(torch.zeros(r, 10), mesh, [Shard(0)]) for n, r in (("a", 300), ("b", 128))}
        held = Holdings(rank=1, world_size=2)
        holdings = {name: held.of(name, tensor, is_parameter=True) for name, tensor in tensors.items()}
        blocks = held_blocks(KeyMap(sources=("a", "b"), keys=(key,)), tensors, held, holdings)
    # Borders at rows 150 and 364 (300 + 64), and the seam at 300: in the second and the third row of blocks.
    assert blocks.matrices["k.weight"].shared == ((1, 2, 0),)
    assert [(p.tensor, p.row, p.rows) for p in blocks.matrices["k.weight"].patches] == [("a", 150, 150), ("b", 364, 64)]


def sharded(model: PreTrainedModel, dim: int) -> PreTrainedModel:
    for layer in model.model.layers:
        fully_shard(layer, shard_placement_fn=lambda p: Shard(p.dim() - 1 if dim else 0))
    return fully_shard(model)


@pytest.mark.parametrize(("world_size", "dim"), [(1, 0), (3, 0), (5, 0), (2, 1)])
def test_ranks_number_the_shared_blocks_alike(world_size: int, dim: int) -> None:
    shared: dict[str, Any] = {}
    counts = set()
    for rank in range(world_size):
        with playing(rank, world_size):
            blocks = plan(sharded(tiny_qwen3_moe(), dim), fp8(), rank=rank, world_size=world_size).blocks
        assert blocks is not None
        counts.add(blocks.shared_count)
        for name, matrix in blocks.matrices.items():
            assert shared.setdefault(name, matrix.shared) == matrix.shared
    places = sorted((place, count) for of_one in shared.values() for _, count, place in of_one)
    ends = [place + count for place, count in places]  # each matrix is one column of blocks wide
    assert [place for place, _ in places] == [0, *ends][: len(places)]
    assert counts == {ends[-1] if ends else 0}
    # Every matrix of these models is one block. Over 3 ranks whole experts, over 5 the last rank holds none of them.
    experts = [name for name, of_one in shared.items() if of_one and "experts" in name]
    assert bool(experts) == (dim == 1)
    assert any(of_one for of_one in shared.values()) == (world_size > 1)
