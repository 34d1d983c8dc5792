"""Quantizing into the arena: blocks of every kind, and no more memory than a piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.utils.quantization_config import FineGrainedFP8Config

from stillframe.patches import block_count
from stillframe.records import Blocks, Matrix, Patch, QuantizedCopy, ScalesCopy
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.quantize import PIECE_ELEMENTS, Quantizer

FP8 = torch.float8_e4m3fn


def prepared(rows: int, columns: int) -> tuple[Quantizer, Arena, int]:
    """A Quantizer of one matrix, all of it in tensor "w"; its arena, and where in that the values begin."""
    steps = {"element": 0, "element_step": columns, "place": 0, "place_step": columns}
    patch = Patch(tensor="w", row=0, rows=rows, column=0, columns=columns, **steps)
    blocks = Blocks(matrices={"m": Matrix(rows=rows, columns=columns, patches=(patch,), shared=())}, shared_count=0)
    count = block_count(rows) * block_count(columns)
    of_matrix: dict[str, Any] = {"tensor": "w", "first_element": 0, "matrix": "m", "position": 0}
    copies = (
        QuantizedCopy(**of_matrix, element_count=rows * columns, arena_offset=4 * count, dtype="float8_e4m3fn"),
        ScalesCopy(**of_matrix, element_count=count, arena_offset=0, dtype="float32"),
    )
    arena = Arena(4 * count + rows * columns)
    return Quantizer(copies, blocks, arena, None), arena, 4 * count


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` through a Quantizer, in one copy; its values and scales."""
    rows, columns = weight.shape
    quantizer, arena, begin = prepared(rows, columns)
    assert quantizer.staged_bytes == begin + rows * columns
    quantizer.copy({"w": weight.reshape(-1)})
    values = arena.bytes[begin : begin + rows * columns].view(FP8).view(rows, columns).clone()
    scales = arena.bytes[:begin].view(torch.float32).view(block_count(rows), block_count(columns)).clone()
    arena.close()
    return values, scales


def by_transformers(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    class Quantization:
        quantization_config = FineGrainedFP8Config()

    found = Fp8Quantize(Quantization()).convert({"m.weight": weight})
    return found["m.weight"], found["m.weight_scale_inv"]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_whole_blocks_have_the_bits_that_transformers_gives_them(dtype: torch.dtype) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[:128, :128] = 0
    weight[200, 130] = 3e4
    values, scales = quantize(weight)
    expected, expected_scales = by_transformers(weight)
    assert same_bits(values, expected)
    assert same_bits(scales, expected_scales)
    assert scales[0, 0] == 1


def test_what_is_no_number_stays_where_it_is_seen() -> None:
    weight = torch.full((128, 384), 0.5)
    weight[5, 5], weight[7, 130] = torch.nan, -torch.inf
    values, scales = quantize(weight)
    expected, expected_scales = by_transformers(weight)
    assert torch.equal(values.float().isnan(), expected.float().isnan())
    assert same_bits(scales, expected_scales)
    back = values.float() * scales.repeat_interleave(128, 1)
    assert back[5, 5].isnan()
    assert back[:, :128].isnan().sum() == 1
    assert back[:, 128:256].isnan().all()
    assert torch.allclose(back[:, 256:], weight[:, 256:])


def test_a_block_of_almost_nothing_becomes_zeros() -> None:
    # Its factor would be infinite, and a zero in it no number.
    weight = torch.zeros(128, 128)
    weight[0, 0] = 1e-38
    values, scales = quantize(weight)
    assert by_transformers(weight)[0].float().isnan().any()
    assert scales.item() == 1
    assert not values.float().any()


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation makes anew, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                self.largest_bytes = max(self.largest_bytes, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("shape", [(3000, 1000), (260, 9000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_larger_than_a_piece_is_made(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.zeros(shape, dtype=dtype)
    quantizer, arena, _ = prepared(*shape)
    with Allocations() as made:
        quantizer.copy({"w": weight.view(-1)})
    assert PIECE_ELEMENTS < made.largest_bytes <= 4 * PIECE_ELEMENTS < weight.numel()
    arena.close()
