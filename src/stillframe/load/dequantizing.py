"""Weights that are stored in fp8 with a scale for each block: which they are, and their values.

The block size is that of config.json, and the scales must have its shape. transformers (5.23) takes it from the shape
of the scales instead, which is wrong for matrices whose last blocks are smaller. Source: transformers
`integrations/finegrained_fp8.py` (`Fp8Dequantize._dequantize_one`), whose arithmetic this is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from stillframe.errors import CorruptCheckpoint
from stillframe.layout.quantizing import FP8, SCALES_SUFFIX
from stillframe.load.folder import Folder
from stillframe.load.safetensors import StoredTensor
from stillframe.patches import MatrixRun, bands, block_count, patches_of

CONFIG_NAME = "config.json"
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """The scales of a stored weight: one, in the last two dimensions of `tensor`, for each block of `block_shape`."""

    tensor: StoredTensor
    block_shape: tuple[int, int]

    def rows_of(self, weight: StoredTensor, low: int, high: int) -> tuple[int, int]:
        """The rows of scales, `(first, count)`, for elements `low` to `high` of the weight, all flat."""
        first, last = (self._row_of(weight, element) for element in (low, high - 1))
        return first, last + 1 - first

    def _row_of(self, weight: StoredTensor, element: int) -> int:
        matrix, row = divmod(element // weight.shape[-1], weight.shape[-2])
        return matrix * self.tensor.shape[-2] + row // self.block_shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What of a directory is in fp8.

    `scales`: by key of the weight. `as_floats`: all that is stored but scales, weights as the numbers that they are
    when multiplied. `unpaired`: scales of no weight in fp8. `unfit`: weights that cannot be read, and why.
    """

    scales: Mapping[str, Scales]
    as_floats: Mapping[str, StoredTensor]
    unpaired: tuple[str, ...]
    unfit: Mapping[str, str]


def find_quantized(place: Folder, stored: Mapping[str, StoredTensor]) -> Quantized:
    """Pair weights in fp8 with their scales. A directory whose config.json does not say that it is in fp8, and that has
    no such pairs, is as it is. Raises CorruptCheckpoint for a config.json that is none.
    """
    weights = {key for key, tensor in stored.items() if tensor.dtype == FP8}
    beside = {key for key in stored if key.endswith(SCALES_SUFFIX)}
    paired = {key for key in weights if key + SCALES_SUFFIX in beside}
    config = _quantization_config(place) if weights or beside else None
    if config is None and not paired:
        return Quantized(scales={}, as_floats=stored, unpaired=(), unfit={})
    block_shape = _block_shape(config)
    scales: dict[str, Scales] = {}
    unfit: dict[str, str] = {}
    for key in sorted(weights):
        problem = _problem(stored[key], stored.get(key + SCALES_SUFFIX), config, block_shape)
        if problem is not None:
            unfit[key] = problem
        else:
            assert block_shape is not None
            scales[key] = Scales(tensor=stored[key + SCALES_SUFFIX], block_shape=block_shape)
    return Quantized(
        scales=scales,
        as_floats={
            key: replace(tensor, dtype=torch.float32) if key in weights else tensor
            for key, tensor in stored.items()
            if key not in beside
        },
        unpaired=tuple(sorted(key for key in beside if key.removesuffix(SCALES_SUFFIX) not in weights)),
        unfit=unfit,
    )


def _quantization_config(place: Folder) -> Mapping[str, object] | None:
    """What config.json says of fp8; None where it says nothing of it, or of another way to quantize."""
    content = place.read_small(CONFIG_NAME)
    if content is None:
        return None
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{place.path / CONFIG_NAME}: is not valid JSON: {error}") from error
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) and found.get("quant_method") == "fp8" else None


def _block_shape(config: Mapping[str, object] | None) -> tuple[int, int] | None:
    shape = None if config is None else config.get("weight_block_size")
    if isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape):
        return shape[0], shape[1]
    return None


def _problem(
    weight: StoredTensor,
    scales: StoredTensor | None,
    config: Mapping[str, object] | None,
    block_shape: tuple[int, int] | None,
) -> str | None:
    """Why a weight in fp8 cannot be read."""
    if scales is None:
        return f"is in fp8, but its scales, {weight.name}{SCALES_SUFFIX}, are not in the files"
    if block_shape is None:
        said = (
            f"{config['weight_block_size']!r:.60}" if config is not None and "weight_block_size" in config else "none"
        )
        return (
            f"is in fp8 with scales, but {CONFIG_NAME} has no quantization_config of quant_method 'fp8' with a "
            f"weight_block_size of two sizes (it has {said}), so what each scale is for is not known"
        )
    if scales.dtype not in _SCALE_DTYPES:
        return f"is in fp8, but its scales are {scales.dtype}, which is not read"
    if len(weight.shape) < 2:
        return f"is in fp8, but is no matrix: it has shape {weight.shape}"
    *outer, rows, columns = weight.shape
    expected = (*outer, block_count(rows, block_shape[0]), block_count(columns, block_shape[1]))
    if scales.shape != expected:
        return (
            f"is in fp8 and has shape {weight.shape}, for which scales of blocks of {block_shape[0]} x "
            f"{block_shape[1]} ({CONFIG_NAME}) have shape {expected}, not {scales.shape}"
        )
    return None


class Dequantizer:
    """The values of elements of a stored weight, in float32; `values` are its rows of scales from `first_row` on."""

    def __init__(self, weight: StoredTensor, scales: Scales, first_row: int, values: torch.Tensor) -> None:
        self._weight = weight
        self._scales = scales
        self._first_row = first_row
        self._values = values

    def __call__(self, stored: torch.Tensor, file_offset: int) -> torch.Tensor:
        """`stored`, flat, multiplied; it is what the file has from `file_offset` on."""
        *_, rows, columns = self._weight.shape
        found = stored.to(torch.float32)
        position = (file_offset - self._weight.file_offset) // stored.element_size()
        down, across = self._scales.block_shape
        run = MatrixRun("", position, 0, 0, stored.numel())
        for patch in patches_of([run], columns):
            left, right = patch.column // across, block_count(patch.column + patch.columns, across)
            skipped = patch.column - left * across
            for first, count in _by_matrix(patch.row, patch.rows, rows):
                for row, blocks, height in bands(first % rows, count, down):
                    of_weight = first - first % rows + row
                    top = first // rows * self._scales.tensor.shape[-2] + row // down - self._first_row
                    of_blocks = self._values[top : top + blocks, left:right]
                    of_columns = of_blocks.repeat_interleave(across, dim=1)[:, skipped : skipped + patch.columns]
                    begin = patch.element + (of_weight - patch.row) * columns
                    part = found[begin : begin + blocks * height * patch.columns]
                    part.view(blocks, height, patch.columns).mul_(of_columns.unsqueeze(1))
        return found


def _by_matrix(first: int, count: int, rows: int) -> list[tuple[int, int]]:
    """Rows of a stack of matrices, cut where another matrix begins."""
    cuts = [first, *range(first - first % rows + rows, first + count, rows), first + count]
    return [(low, high - low) for low, high in pairwise(cuts)]
