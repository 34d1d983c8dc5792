"""Which keys are saved in fp8, their scales, and of which blocks the ranks must share what they know.

The format: `X.weight` as float8_e4m3fn and beside it `X.weight_scale_inv` in float32, one for each block of 128 x 128,
by which the stored values are multiplied to have the weights back. Blocks at the ends are smaller where a size is no
multiple of 128. Source: transformers `integrations/finegrained_fp8.py` (what is converted, names, scales).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from stillframe.errors import UnsupportedModel
from stillframe.layout.casting import kept_by_transformers
from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.placement import Holding, Holdings
from stillframe.layout.runs import Ints, Runs, compose, overlap
from stillframe.patches import BLOCK, MatrixRun, block_count, patches_of
from stillframe.records import Blocks, Matrix
from stillframe.wrappers import unsharded_classes

FP8 = torch.float8_e4m3fn
SCALES_SUFFIX = "_scale_inv"
# Routers choose experts by small differences. Where they are modules of their own they are no linear layers anyway.
_ROUTER = re.compile(r"(?:^|\.)(?:\w+_)?(?:gate|router)(?:\.|$)")
_MAX_RUNS = 64


def quantize_keys(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], key_map: KeyMap, leave: Sequence[re.Pattern[str]]
) -> tuple[KeyMap, tuple[str, ...]]:
    """`key_map`, cast to bfloat16, with linear layers and experts in fp8, each with its scales behind it; and the names
    of the modules that are not, as config.json has them. `tensors` are those of `model`, by all of their names.

    Left alone are weights whose key or runtime name one of `leave` matches, what transformers leaves (the output layer,
    tied weights, `_keep_in_fp32_modules`), routers, and whatever is no matrix. Raises UnsupportedModel where nothing
    is left to quantize, or a name is taken.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a transformers PreTrainedModel: save_dtype='fp8' needs a config.json that "
            "says how the weights are quantized"
        )
    with unsharded_classes(model):
        names = _convertible(model, tensors)
        untouched = set(get_keys_to_not_convert(model))
    patterns = [*leave, *kept_by_transformers(model, "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"), _ROUTER]
    allowed = {
        index
        for index, name in enumerate(key_map.sources)
        if name in names and name.removesuffix(".weight") not in untouched and not any(p.search(name) for p in patterns)
    }
    keys: list[Key] = []
    next_block = 1 + max((key.block for key in key_map.keys), default=0)
    for key in key_map.keys:
        if (
            key.name.endswith(".weight")
            and len(key.shape) == 2
            and key.dtype == torch.bfloat16
            and len(key.runs)
            and key.dims is None
            and allowed.issuperset(key.runs.source.tolist())
            and not any(pattern.search(key.name) for pattern in patterns)
        ):
            keys += _quantized(key, next_block)
            next_block += 1
        else:
            keys.append(key)
    taken = {key.name for key in keys if key.matrix is None}
    clash = [key.name for key in keys if key.matrix not in (None, key.name) and key.name in taken]
    if clash:
        raise UnsupportedModel(f"{type(model).__name__} has a tensor {clash[0]}, the name of the scales in fp8")
    if all(key.matrix is None for key in keys):
        raise UnsupportedModel(
            f"{type(model).__name__} has no linear layer that save_dtype='fp8' quantizes; save it in bfloat16, or "
            "leave fewer modules alone"
        )
    return replace(key_map, keys=tuple(keys)), _left_alone(keys, untouched)


def quantization_config(left_alone: Sequence[str]) -> dict[str, object]:
    """What config.json says of it, as transformers, vLLM and SGLang read it."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(left_alone),
    }


def held_blocks(
    key_map: KeyMap, tensors: Mapping[str, torch.Tensor], held: Holdings, holdings: Mapping[str, Holding]
) -> Blocks:
    """What this rank holds of each quantized key, and the blocks that are cut by a border between ranks.

    No communication: every rank numbers the table of shared blocks alike, from placements alone.
    """
    sources = [
        _Source(
            name,
            tuple(tensors[name].shape),
            held.holders(name),
            held.borders(name, tensors[name]),
            holdings[name].runs,
        )
        for name in key_map.sources
    ]
    known: dict[object, list[tuple[int, int]]] = {}  # most matrices of a model are cut like many others
    matrices = {}
    place = 0
    for key in key_map.keys:
        if key.matrix != key.name:
            continue
        rows, columns = key.shape
        shared = []
        for first, count in _cut_rows(key, sources, known):
            shared.append((first, count, place))
            place += count * block_count(columns)
        patches = patches_of(_held_runs(key, sources), columns)
        if patches:
            matrices[key.name] = Matrix(rows=rows, columns=columns, patches=tuple(patches), shared=tuple(shared))
    return Blocks(matrices=matrices, shared_count=place)


def _convertible(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """The runtime names of the weights that transformers has in fp8: of linear layers, and all of `experts` modules."""
    weights: set[int] = set()
    for name, module in model.named_modules():
        if type(module) is nn.Linear or (isinstance(module, nn.Linear) and "GroupedLinear" in type(module).__name__):
            weights.add(id(module.weight))
        elif name.endswith(".experts"):
            weights.update(id(p) for p in module.parameters(recurse=False) if p.dim() == 3)
    return {name for name, tensor in tensors.items() if id(tensor) in weights}


def _quantized(key: Key, block: int) -> tuple[Key, Key]:
    """The weight and its scales. They are one storage block, so that they are in one file."""
    rows, columns = key.shape
    shape = (block_count(rows), block_count(columns))
    # The scales of a row of blocks belong to who holds the beginning of its first row (there is one element for each).
    first = _row_beginnings(rows, columns)
    if len(key.runs) == 1:
        source, source_start = np.repeat(key.runs.source, shape[0]), key.runs.source_start + first.source_start
        first = Runs(first.start, source, source_start, first.length)
    else:
        first = compose(first, key.runs)
    block_bytes = rows * columns * FP8.itemsize + math.prod(shape) * torch.float32.itemsize
    weight = replace(key, dtype=FP8, block=block, block_bytes=block_bytes, matrix=key.name)
    scales = replace(weight, name=key.name + SCALES_SUFFIX, dtype=torch.float32, shape=shape, runs=first)
    return weight, scales


@lru_cache(maxsize=256)
def _row_beginnings(rows: int, columns: int) -> Runs:
    """The scales of a matrix -> as many elements of it, at the beginning of each row of blocks."""
    index, across = np.arange(block_count(rows), dtype=np.int64), block_count(columns)
    return Runs(index * across, np.zeros_like(index), index * BLOCK * columns, np.full_like(index, across))


def _left_alone(keys: Sequence[Key], untouched: set[str]) -> tuple[str, ...]:
    """The modules with a matrix that is not in fp8; all experts of a layer by one name if none of them is."""
    quantized = [key.name for key in keys if key.matrix is not None]
    inside = {name[: match.end() - 1] for name in quantized for match in re.finditer(r"\.experts\.", name)}
    found: dict[str, None] = {}
    for key in keys:
        if key.matrix is None and len(key.shape) >= 2:
            module = key.name.rpartition(".")[0]
            experts, inner, _ = key.name.rpartition(".experts.")
            found[f"{experts}.experts" if inner and f"{experts}.experts" not in inside else module] = None
    return tuple(dict.fromkeys([*sorted(untouched), *found]))


class _Source(NamedTuple):
    """A tensor of the model: its name and shape, which ranks hold any of it, where what another rank holds begins, and
    what this rank holds."""

    name: str
    shape: tuple[int, ...]
    holders: tuple[int, ...]
    borders: tuple[Ints, ...]
    held: Runs


def _cut_rows(
    key: Key, sources: Sequence[_Source], known: dict[object, list[tuple[int, int]]]
) -> list[tuple[int, int]]:
    """The rows of blocks, as `(first, count)`, that a border between ranks may cut; all, where columns are cut too.

    One too many does no harm. None is missing: who writes the scales of a row of blocks that is not among them, which
    is who holds its beginning, holds all of it.
    """
    rows, columns = key.shape
    every = [(0, block_count(rows))]
    used = [sources[number] for number in dict.fromkeys(key.runs.source.tolist())]
    of_one_stage = all(source.holders is used[0].holders for source in used)
    if of_one_stage and not any(len(along) for source in used for along in source.borders):
        return []
    if len(key.runs) > _MAX_RUNS or not of_one_stage:
        return every
    pieces = []
    runs = (key.runs.start, key.runs.source, key.runs.source_start, key.runs.length)
    for start, number, source_start, length in zip(*(column.tolist() for column in runs), strict=True):
        shape, borders = sources[number].shape, sources[number].borders
        if len(shape) < 2 or shape[-1] != columns or any(n % columns for n in (start, source_start, length)):
            return every
        first, count = source_start // columns % shape[-2], length // columns
        if first + count > shape[-2] or len(borders[-1]):
            return every
        pieces.append((start // columns, borders[-2], first, count))
    name = tuple((start, id(along), first, count) for start, along, first, count in pieces)
    if name not in known:
        known[name] = _blocks_with_cuts(pieces)
    return known[name]


def _blocks_with_cuts(pieces: Sequence[tuple[int, Ints, int, int]]) -> list[tuple[int, int]]:
    """The rows of blocks with a border inside: of a matrix made of pieces `(first row, borders of the tensor that it
    comes from, first row there, rows)`. Where a piece begins, elements of another tensor do, which others may hold.
    """
    cuts = [
        np.append(along[(along > first) & (along < first + count)] - first, 0) + start
        for start, along, first, count in pieces
    ]
    cut = np.concatenate(cuts)
    blocks = np.unique(cut[cut % BLOCK != 0] // BLOCK)
    groups = np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1)
    return [(int(group[0]), len(group)) for group in groups if len(group)]


def _held_runs(key: Key, sources: Sequence[_Source]) -> list[MatrixRun]:
    """What this rank holds of a key, ascending."""
    found = []
    for number in dict.fromkeys(key.runs.source.tolist()):
        source, wanted = sources[number], key.runs
        of_source = wanted.source == number
        start, source_start, length = (c[of_source] for c in (wanted.start, wanted.source_start, wanted.length))
        mine = source.held
        if len(mine) == 1 == len(length):  # nearly always, and much faster without arrays
            low = max(int(source_start[0]), int(mine.start[0]))
            high = min(int(source_start[0] + length[0]), int(mine.start[0] + mine.length[0]))
            element = int(mine.source_start[0]) + low - int(mine.start[0])
            position = int(start[0]) + low - int(source_start[0])
            found += [MatrixRun(source.name, position, element, element, high - low)] if low < high else []
            continue
        a, b, begin, count = overlap(source_start, length, mine.start, mine.length)
        positions = start[a] + begin - source_start[a]
        elements = mine.source_start[b] + begin - mine.start[b]
        found += [
            MatrixRun(source.name, p, e, e, n)
            for p, e, n in zip(positions.tolist(), elements.tolist(), count.tolist(), strict=True)
        ]
    return sorted(found, key=lambda run: run.position)
