"""Who writes what of tensors that several ranks hold alike."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from stillframe.layout.runs import Ints

_PAGE_BYTES = 4096
_FINE_BYTES = 64
_PAGE_CUTS_FROM_BYTES = 1 << 20
_PIECES_PER_SHARE = 24
"""A piece has at most this part of a replica's fair share, or is one of as many as there are replicas: so the largest
share is at most 1 + 1/24 of the mean, and the number of pieces grows with the replicas, not with their product with
the tensors."""


class RowCut(NamedTuple):
    """`row_count` rows from `first_row` on, which the replica of this number (its place among them) writes."""

    replica: int
    first_row: int
    row_count: int


def fair_part(file_offset: Ints, length: Ints, *, part: int, parts: int) -> tuple[Ints, Ints, Ints]:
    """Part `part` of `parts` of a list of byte runs: `(index of the run, skipped bytes, length)` of what is in it.

    All holders call this with the same list, so the parts tile it: every byte is in exactly one. Cuts fall on pages of
    the file where the parts are large (two ranks then never write to one page, and direct I/O is possible), else on
    64 bytes.
    """
    ends = np.cumsum(length)
    begins = ends - length
    total = int(ends[-1]) if len(ends) else 0
    grain = _PAGE_BYTES if total >= parts * _PAGE_CUTS_FROM_BYTES else _FINE_BYTES
    low, high = (_cut_at(total * k // parts, begins, ends, file_offset, grain) for k in (part, part + 1))
    inside_low = np.maximum(begins, low)
    inside_high = np.minimum(ends, high)
    index = np.flatnonzero(inside_high > inside_low)
    return index, (inside_low - begins)[index], (inside_high - inside_low)[index]


def _cut_at(position: int, begins: Ints, ends: Ints, file_offset: Ints, grain: int) -> int:
    """The next place at or behind `position` that is a multiple of `grain` in its file, or the border of a run."""
    if len(ends) == 0 or position == 0:
        return 0
    run = int(np.searchsorted(ends, position, side="left"))  # a position on a border belongs to the run before it
    skip = -(int(file_offset[run]) + position - int(begins[run])) % grain
    return min(position + skip, int(ends[run]))


def share_out(boxes: Sequence[tuple[int, int]], replica_count: int, *, item_bytes: int) -> list[list[RowCut]]:
    """Share out boxes of `(rows, bytes of a row)` among replicas that hold them alike: of each box, who writes what.

    Each box is tiled by its cuts. Small ones stay whole. `item_bytes` is what each piece costs besides its own bytes.
    Deterministic: all replicas, and whoever plans for them, call this with the same boxes in the same order.
    """
    if replica_count == 1:
        return [[RowCut(0, 0, rows)] for rows, _ in boxes]
    total_bytes = sum(rows * row_bytes + item_bytes for rows, row_bytes in boxes)
    largest_bytes = max(1, total_bytes // (replica_count * _PIECES_PER_SHARE))
    loads = [(0, replica) for replica in range(replica_count)]  # a heap: the least loaded first
    shared = []
    for rows, row_bytes in boxes:
        pieces = max(1, min(replica_count, rows, -(-rows * row_bytes // largest_bytes)))
        counts = [rows // pieces + (piece < rows % pieces) for piece in range(pieces)]
        if pieces == replica_count:  # one for each, the larger for those with less
            loads.sort()
            takers = [replica for _, replica in loads]
            loads = [
                (load + count * row_bytes + item_bytes, replica)
                for (load, replica), count in zip(loads, counts, strict=True)
            ]
            heapq.heapify(loads)
        else:
            takers = []
            for count in counts:
                load, replica = loads[0]
                takers.append(replica)
                heapq.heapreplace(loads, (load + count * row_bytes + item_bytes, replica))
        firsts = accumulate(counts, initial=0)
        shared.append([RowCut(*cut) for cut in zip(takers, firsts, counts, strict=False)])
    return shared
