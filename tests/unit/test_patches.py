"""Rectangles of a matrix: every element of the runs once, at its place, in few of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stillframe.patches import MatrixRun, bands, block_count, patches_of
from stillframe.records import Patch


def elements(patches: list[Patch]) -> list[tuple[str, int, int, int, int]]:
    """Of every element: tensor, row, column, where it is, and its other place."""
    return [
        (p.tensor, p.row + r, p.column + c, p.element + r * p.element_step + c, p.place + r * p.place_step + c)
        for p in patches
        for r in range(p.rows)
        for c in range(p.columns)
    ]


@given(st.data(), st.integers(1, 7))
def test_patches_have_every_element_at_its_place(data: st.DataObject, columns: int) -> None:
    position = element = place = 0
    runs, expected = [], []
    for _ in range(data.draw(st.integers(0, 6))):
        position += data.draw(st.sampled_from([0, 1, columns]))
        element += data.draw(st.integers(0, 2))
        place += data.draw(st.integers(0, 2))
        length = data.draw(st.integers(1, 3 * columns))
        tensor = data.draw(st.sampled_from(["a", "b"]))
        runs.append(MatrixRun(tensor, position, element, place, length))
        expected += [(tensor, *divmod(position + i, columns), element + i, place + i) for i in range(length)]
        position, element, place = position + length, element + length, place + length
    assert elements(patches_of(runs, columns)) == expected


def test_a_part_of_each_row_is_one_patch() -> None:
    runs = [MatrixRun("a", 10 * row + 4, 3 * row, 64 * row, 3) for row in range(100)]
    (patch,) = patches_of(runs, 10)
    assert (patch.rows, patch.columns, patch.element_step, patch.place_step) == (100, 3, 3, 64)
    whole = patches_of([MatrixRun("a", 0, 5, 7, 1000)], 10)
    assert [(p.rows, p.columns, p.element_step) for p in whole] == [(100, 10, 10)]


@given(st.integers(0, 40), st.integers(0, 90), st.integers(1, 16), st.one_of(st.none(), st.integers(0, 50)))
def test_bands_tile_and_stay_in_their_blocks(first: int, count: int, block: int, at_most: int | None) -> None:
    end = first
    for at, blocks, size in bands(first, count, block, at_most=at_most):
        assert at == end
        assert blocks == 1 or size == block
        assert at // block + blocks == block_count(at + blocks * size, block)
        if at_most is not None:
            assert blocks * size <= max(1, at_most)
        end = at + blocks * size
    assert end == first + count
