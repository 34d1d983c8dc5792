"""Runs: where consecutive elements of one flat array lie in other flat arrays.

The one data structure of the layout. A safetensors key is runs over the model's tensors; a shard is runs over its
tensor; both are intersected by `overlap`. Everything is counted in elements of flat, row-major arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Runs:
    """Run i says: elements `[start, start+length)` here are `[source_start, source_start+length)` of array `source`."""

    start: Ints
    source: Ints
    source_start: Ints
    length: Ints

    @staticmethod
    def of(rows: Sequence[tuple[int, int, int, int]]) -> Runs:
        """Runs from rows of `(start, source, source_start, length)`."""
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        return Runs(table[:, 0], table[:, 1], table[:, 2], table[:, 3])

    def __len__(self) -> int:
        return len(self.start)

    def split(self) -> list[Runs]:
        """Cut before each run that starts at 0: what several arrays consist of, one after the other."""
        borders = [*np.flatnonzero(self.start == 0).tolist(), len(self)]
        start, source, source_start, length = self.start, self.source, self.source_start, self.length
        return [
            Runs(start[low:high], source[low:high], source_start[low:high], length[low:high])
            for low, high in pairwise(borders)
        ]

    def covers(self, size: int) -> bool:
        """Whether the runs, in order, tile `[0, size)`: no gap, no overlap."""
        ends = np.cumsum(self.length)
        total = int(ends[-1]) if len(ends) else 0
        return total == size and bool((self.start == ends - self.length).all())


def overlap(a_start: Ints, a_length: Ints, b_start: Ints, b_length: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Every overlap of an interval of `a` with one of `b`, as `(index in a, index in b, start, length)`.

    `b` must be ascending and disjoint; `a` may be anything. Results come in the order of `a`, then of `b`.
    """
    first = np.searchsorted(b_start + b_length, a_start, side="right")
    last = np.searchsorted(b_start, a_start + a_length, side="left")
    counts = np.maximum(last - first, 0)
    a_index = np.repeat(np.arange(len(a_start), dtype=np.int64), counts)
    within = np.arange(len(a_index), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    b_index = np.repeat(first, counts) + within
    start = np.maximum(a_start[a_index], b_start[b_index])
    end = np.minimum((a_start + a_length)[a_index], (b_start + b_length)[b_index])
    full = end > start  # an empty interval of a or b touches its neighbours and overlaps nothing
    return a_index[full], b_index[full], start[full], (end - start)[full]


def compose(outer: Runs, inner: Runs) -> Runs:
    """Follow `outer`, whose runs all point into one array, through `inner`, which tiles that array."""
    o, i, start, length = overlap(outer.source_start, outer.length, inner.start, inner.length)
    return coalesce(
        Runs(
            outer.start[o] + (start - outer.source_start[o]),
            inner.source[i],
            inner.source_start[i] + (start - inner.start[i]),
            length,
        )
    )


def coalesce(runs: Runs) -> Runs:
    """Join neighbouring runs that continue each other on both sides."""
    if len(runs) < 2:
        return runs
    joins = (
        (runs.source[1:] == runs.source[:-1])
        & (runs.start[1:] == runs.start[:-1] + runs.length[:-1])
        & (runs.source_start[1:] == runs.source_start[:-1] + runs.length[:-1])
    )
    heads = np.flatnonzero(np.concatenate(([True], ~joins)))
    return Runs(runs.start[heads], runs.source[heads], runs.source_start[heads], np.add.reduceat(runs.length, heads))


def strided(offset: int, shape: Sequence[int], stride: Sequence[int], source: int) -> Runs:
    """The runs of a strided view (all in elements) of array `source`, read in row-major order."""
    block, axis = 1, len(shape)
    while axis > 0 and (shape[axis - 1] == 1 or stride[axis - 1] == block):
        axis -= 1
        block *= shape[axis]
    starts = np.array([offset], dtype=np.int64)
    for size, step in zip(shape[:axis], stride[:axis], strict=True):
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * step).reshape(-1)
    if block == 0 or len(starts) == 0:
        return Runs.of([])
    count = len(starts)
    return coalesce(
        Runs(
            np.arange(count, dtype=np.int64) * block,
            np.full(count, source, dtype=np.int64),
            starts,
            np.full(count, block, dtype=np.int64),
        )
    )
