"""Quantizing this rank's share to fp8 on its way into the arena, in pieces of bounded size.

The arithmetic is that of transformers (`integrations/finegrained_fp8.py`, `Fp8Quantize._quantize_one`), operation by
operation, so that the bits are those of quantizing the whole matrix in one place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from stillframe.patches import BLOCK, MatrixRun, bands, block_count, patches_of
from stillframe.records import Blocks, Copy, Patch, QuantizedCopy, ScalesCopy
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.peers import Peers

PIECE_ELEMENTS = 1 << 18
"""How many elements are worked on at once, a row at least; each takes 4 bytes, and 1 as it is stored, beside the model
and the arena."""

_FP8 = torch.float8_e4m3fn
_MAX = torch.finfo(_FP8).max
_NOT_SIGN = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class _Grid:
    """The blocks of one matrix: where they are among all blocks, and how many rows and columns of them there are."""

    start: int
    rows: int
    columns: int

    def of(self, values: torch.Tensor) -> torch.Tensor:
        return values[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)


class Quantizer:
    """Fills the `copies` of matrices and of their scales; made once per layout, then only computes.

    `peers` is needed where `blocks` are shared.
    """

    def __init__(self, copies: Sequence[Copy], blocks: Blocks, arena: Arena, peers: Peers | None) -> None:
        weights: dict[str, list[QuantizedCopy]] = defaultdict(list)
        for copy in copies:
            if isinstance(copy, QuantizedCopy):
                weights[copy.matrix].append(copy)
        self._scales = [copy for copy in copies if isinstance(copy, ScalesCopy)]
        self._blocks = blocks
        self._arena = arena
        self._peers = peers
        self._grids: dict[str, _Grid] = {}
        self._count = 0
        for name, matrix in blocks.matrices.items():
            grid = _Grid(self._count, block_count(matrix.rows), block_count(matrix.columns))
            self._grids[name] = grid
            self._count += grid.rows * grid.columns
        self._looked_at = list(self._needed(weights))
        self._written = [
            (patch, self._grids[name])
            for name, copies_of in weights.items()
            for patch in patches_of(
                (MatrixRun(c.tensor, c.position, c.first_element, c.arena_offset, c.element_count) for c in copies_of),
                blocks.matrices[name].columns,
            )
        ]
        self._own, self._table = self._shared_index()
        self.tensors = {patch.tensor for patch, _ in (*self._looked_at, *self._written)}
        self.staged_bytes = sum(c.element_count for of_one in weights.values() for c in of_one)
        self.staged_bytes += sum(c.element_count * torch.float32.itemsize for c in self._scales)

    @torch.no_grad()
    def copy(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Quantize from `flat`, the local tensors by name, into the arena.

        Where blocks are shared, blocks until all ranks have come (see `Peers`).
        """
        device = next((flat[name].device for name in sorted(self.tensors)), torch.device("cpu"))
        maxima = torch.zeros(self._count, dtype=torch.float32, device=device)
        for patch, grid in self._looked_at:
            _look_at(flat[patch.tensor], patch, grid.of(maxima))
        if self._blocks.shared_count:
            self._share(maxima)
        # A block of zeros has the scale 1. So has one so small that the factor would be infinite (transformers: NaN).
        factors = _MAX / torch.where(maxima > 0, maxima, torch.ones_like(maxima))
        factors = torch.where((maxima > 0) & (factors < torch.inf), factors, torch.ones_like(factors))
        arena = self._arena.bytes.view(_FP8)
        for patch, grid in self._written:
            _quantize(flat[patch.tensor], patch, grid.of(factors), arena)
        scales = (1.0 / factors).cpu()
        numbers = self._arena.bytes
        for copy in self._scales:
            start = self._grids[copy.matrix].start + copy.position
            target = numbers[copy.arena_offset : copy.arena_offset + 4 * copy.element_count].view(torch.float32)
            target.copy_(scales[start : start + copy.element_count])

    def _share(self, maxima: torch.Tensor) -> None:
        assert self._peers is not None, "blocks are shared only where there are other ranks"
        table = torch.zeros(self._blocks.shared_count, dtype=torch.float32, device="cpu")
        own = self._own.to(maxima.device)
        table[self._table] = maxima[own].cpu()
        # As integers, numbers that are not negative have the same order, and NaN is the largest.
        self._peers.largest(table.view(torch.int32).bitwise_and_(_NOT_SIGN))
        maxima[own] = table[self._table].to(maxima.device)

    def _needed(self, weights: Mapping[str, Sequence[QuantizedCopy]]) -> Iterator[tuple[Patch, _Grid]]:
        """The parts of what this rank holds that make the maxima which it needs, or which others need of it."""
        scales: dict[str, list[ScalesCopy]] = defaultdict(list)
        for of_scales in self._scales:
            scales[of_scales.matrix].append(of_scales)
        for name, matrix in self._blocks.matrices.items():
            grid = self._grids[name]
            needed: set[int] = set()
            for first, count, _ in matrix.shared:
                needed.update(range(first, first + count))
            row = BLOCK * matrix.columns
            for copies, unit in ((weights.get(name, ()), row), (scales.get(name, ()), grid.columns)):
                for copy in copies:
                    last = copy.position + copy.element_count - 1
                    needed.update(range(copy.position // unit, last // unit + 1))
            for patch in matrix.patches:
                for first, count in _stretches(needed):
                    low = max(patch.row, first * BLOCK)
                    high = min(patch.row + patch.rows, (first + count) * BLOCK)
                    if low < high:
                        element = patch.element + (low - patch.row) * patch.element_step
                        yield replace(patch, row=low, rows=high - low, element=element), grid

    def _shared_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of this rank's maxima are in the table of shared ones, and where."""
        own, table = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for name, matrix in self._blocks.matrices.items():
            grid = self._grids[name]
            for first, count, place in matrix.shared:
                index = torch.arange(count * grid.columns)
                own.append(index + grid.start + first * grid.columns)
                table.append(index + place)
        return torch.cat(own), torch.cat(table)


def _stretches(numbers: set[int]) -> list[tuple[int, int]]:
    """`numbers` as `(first, count)` of those that follow each other."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def _look_at(flat: torch.Tensor, patch: Patch, maxima: torch.Tensor) -> None:
    """Raise the maxima of the blocks that the patch is in. Nothing as large as the patch is allocated."""
    step = patch.element_step
    for row, down, height in bands(patch.row, patch.rows, BLOCK):
        for column, across, width in bands(patch.column, patch.columns, BLOCK):
            first = patch.element + (row - patch.row) * step + column - patch.column
            part = flat.as_strided((down, height, across, width), (height * step, step, width, 1), first)
            low, high = part.amin((1, 3)).to(torch.float32), part.amax((1, 3)).to(torch.float32)
            top, left = row // BLOCK, column // BLOCK
            seen = maxima[top : top + down, left : left + across]
            seen.copy_(torch.maximum(seen.to(part.device), torch.maximum(high, -low).abs()))


def _quantize(flat: torch.Tensor, patch: Patch, factors: torch.Tensor, arena: torch.Tensor) -> None:
    """Multiply the patch by the factors of its blocks, and put it into the arena in fp8, piece by piece."""
    left, right = patch.column // BLOCK, block_count(patch.column + patch.columns)
    skipped = patch.column - left * BLOCK
    for row, down, height in bands(patch.row, patch.rows, BLOCK, at_most=PIECE_ELEMENTS // patch.columns):
        done = row - patch.row
        source_step, step = patch.element_step, patch.place_step
        values = flat.as_strided(
            (down, height, patch.columns), (height * source_step, source_step, 1), patch.element + done * source_step
        )
        if values.dtype == torch.float64:
            values = values.to(torch.float32)
        of_blocks = factors[row // BLOCK : row // BLOCK + down, left:right].to(values.device)
        of_columns = of_blocks.repeat_interleave(BLOCK, dim=1)[:, skipped : skipped + patch.columns]
        scaled = (values * of_columns.unsqueeze(1)).clamp_(-_MAX, _MAX)
        target = arena.as_strided((down, height, patch.columns), (height * step, step, 1), patch.place + done * step)
        target.copy_(scaled.to(_FP8))
