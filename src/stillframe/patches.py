"""Flat runs of a matrix as rectangles, and rectangles in rows of blocks: how fp8 goes through a matrix, torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from stillframe.records import Patch

BLOCK = 128
"""Rows and columns of a block that has one scale, in what is saved."""


class MatrixRun(NamedTuple):
    """Consecutive elements: `length` from `position` of the matrix on, in the local part of `tensor`, and elsewhere."""

    tensor: str
    position: int
    element: int
    place: int
    length: int


def block_count(size: int, block: int = BLOCK) -> int:
    """How many blocks there are along a dimension; the last may be smaller."""
    return -(-size // block)


def patches_of(runs: Iterable[MatrixRun], columns: int) -> list[Patch]:
    """The runs of a matrix with `columns` as few rectangles: whole rows together, and parts of rows below each other.

    `runs` are ascending in the matrix.
    """
    found: list[Patch] = []
    last: _Rows | None = None
    for run in runs:
        for piece in _in_rows(run, columns):
            if last is not None and last.takes(piece):
                continue
            if last is not None:
                found.append(last.patch())
            last = piece
    if last is not None:
        found.append(last.patch())
    return found


def bands(first: int, count: int, block: int, *, at_most: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Cut `count` indices from `first` on at the borders of blocks: `(first, blocks, indices in each)`.

    A part of a block comes alone, whole ones together, as many as hold `at_most` indices; of a block that is larger
    than that, parts come.
    """
    at, end = first, first + count
    limit = max(1, count if at_most is None else at_most)
    while at < end:
        size = min(block - at % block, end - at)
        if size < block or limit < block:
            blocks, size = 1, min(size, limit)
        else:
            blocks = min(end - at, limit) // block
        yield at, blocks, size
        at += blocks * size


@dataclass(slots=True)
class _Rows:
    """A patch that is growing; with one row its steps are not known yet."""

    tensor: str
    row: int
    rows: int
    column: int
    columns: int
    element: int
    element_step: int
    place: int
    place_step: int

    def takes(self, other: _Rows) -> bool:
        """Whether `other` was the next row, and is now a part of this."""
        if (other.tensor, other.column, other.columns) != (self.tensor, self.column, self.columns):
            return False
        if other.row != self.row + self.rows or other.rows != 1:
            return False
        element_step, place_step = other.element - self.element, other.place - self.place
        if self.rows == 1 and element_step >= self.columns and place_step >= self.columns:
            self.element_step, self.place_step = element_step, place_step
        elif (element_step, place_step) != (self.rows * self.element_step, self.rows * self.place_step):
            return False
        self.rows += 1
        return True

    def patch(self) -> Patch:
        return Patch(
            tensor=self.tensor,
            row=self.row,
            rows=self.rows,
            column=self.column,
            columns=self.columns,
            element=self.element,
            element_step=self.element_step,
            place=self.place,
            place_step=self.place_step,
        )


def _in_rows(run: MatrixRun, columns: int) -> Iterator[_Rows]:
    """The end of a row, whole rows, the beginning of a row: what of these a run has."""
    done = 0
    while done < run.length:
        row, column = divmod(run.position + done, columns)
        left = run.length - done
        rows = 1 if column or left < columns else left // columns
        width = min(columns - column, left)
        yield _Rows(run.tensor, row, rows, column, width, run.element + done, width, run.place + done, width)
        done += rows * width
