"""Who writes what of tensors that several ranks hold alike."""

from __future__ import annotations

import numpy as np

from stillframe.layout.runs import Ints

_PAGE_BYTES = 4096
_FINE_BYTES = 64
_PAGE_CUTS_FROM_BYTES = 1 << 20


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
