"""Keys that are a tensor with its dimensions in another order, such as transposed matrices: who can copy them how.

A rank that holds matrices whole copies them as transposed views, whatever their size. One whose shard cuts them lists
the runs, most of them of one element; where that would be too many, one rank gets the tensor whole (`gather`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.placement import Holding
from stillframe.layout.runs import strided
from stillframe.layout.tracing import refuse_scattered


def settle_turned(key_map: KeyMap, tensors: Mapping[str, torch.Tensor], holdings: Mapping[str, Holding]) -> KeyMap:
    """`key_map` as this rank can copy it: keys with `dims` whose slices it holds in part are listed as runs instead.

    Which keys these are may differ from rank to rank; the bytes of the files do not. Raises UnsupportedModel, naming
    the key, where that would be too many runs.
    """

    def settled(key: Key) -> Key:
        if key.dims is None:
            return key
        index = int(key.runs.source[0])
        name = key_map.sources[index]
        shape = tuple(tensors[name].shape)
        if _holds_whole(holdings[name], _slice_elements(shape, key.dims)):
            return key
        stride = [math.prod(shape[d + 1 :]) for d in key.dims]
        refuse_scattered(
            key.name, key.shape, stride, hint=f" where a rank has parts of its matrices, as of {name} here"
        )
        return replace(key, runs=strided(0, key.shape, stride, index), dims=None)

    return replace(key_map, keys=tuple(settled(key) for key in key_map.keys))


def _slice_elements(shape: Sequence[int], dims: Sequence[int]) -> int:
    """How many elements keep together: those below the outermost dimensions that stay where they are."""
    return math.prod(shape[outer_dims(dims) :])


def outer_dims(dims: Sequence[int]) -> int:
    """How many of the outermost dimensions stay where they are."""
    outer = 0
    while outer < len(dims) and dims[outer] == outer:
        outer += 1
    return outer


def _holds_whole(holding: Holding, slice_elements: int) -> bool:
    """Whether each run that is held consists of whole slices, so that it is the same run of the reordered tensors."""
    columns = (holding.runs.start, holding.runs.source_start, holding.runs.length)
    return not any((column % slice_elements).any() for column in columns)
