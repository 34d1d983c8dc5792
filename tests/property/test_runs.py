"""The algebra of runs against the same thing done element by element with numpy."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stillframe.layout.runs import Runs, coalesce, compose, overlap, strided

Element = tuple[int, int, int]  # position here, source, position there


def elements(runs: Runs) -> list[Element]:
    return [
        (start + i, source, source_start + i)
        for start, source, source_start, length in zip(
            *(column.tolist() for column in (runs.start, runs.source, runs.source_start, runs.length)), strict=True
        )
        for i in range(length)
    ]


@st.composite
def ascending_intervals(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Disjoint intervals in ascending order, some of them empty or touching."""
    starts, lengths, position = [], [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=8)):
        starts.append(position + gap)
        lengths.append(length)
        position += gap + length
    return starts, lengths


@st.composite
def tiling(draw: st.DrawFn, *, sources: int) -> tuple[Runs, int]:
    """Runs that tile `[0, size)`, and the size."""
    lengths = draw(st.lists(st.integers(0, 5), max_size=8))
    starts = np.cumsum(lengths) - lengths if lengths else []
    rows = [
        (int(start), draw(st.integers(0, sources - 1)), draw(st.integers(0, 20)), length)
        for start, length in zip(starts, lengths, strict=True)
    ]
    return Runs.of(rows), sum(lengths)


def as_ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@given(
    a=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=8),
    b=ascending_intervals(),
)
def test_overlap_is_every_common_element_in_the_order_of_a_then_b(
    a: list[tuple[int, int]], b: tuple[list[int], list[int]]
) -> None:
    b_starts, b_lengths = b
    a_index, b_index, start, length = overlap(
        as_ints([s for s, _ in a]), as_ints([n for _, n in a]), as_ints(b_starts), as_ints(b_lengths)
    )
    expected = [
        (i, j, x)
        for i, (s, n) in enumerate(a)
        for j, (t, m) in enumerate(zip(b_starts, b_lengths, strict=True))
        for x in range(max(s, t), min(s + n, t + m))
    ]
    found = [
        (i, j, s + k)
        for i, j, s, n in zip(a_index.tolist(), b_index.tolist(), start.tolist(), length.tolist(), strict=True)
        for k in range(n)
    ]
    assert found == expected
    assert (length > 0).all()


@given(st.data())
def test_compose_follows_every_element_through_both(data: st.DataObject) -> None:
    inner, size = data.draw(tiling(sources=3))
    pieces = data.draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size)), max_size=6))
    rows, position = [], 0
    for one, two in pieces:
        low, high = sorted((one, two))
        rows.append((position, 0, low, high - low))
        position += high - low
    through = {here: (source, there) for here, source, there in elements(inner)}
    expected = [(here, *through[middle]) for here, _, middle in elements(Runs.of(rows))]
    composed = compose(Runs.of(rows), inner)
    assert elements(composed) == expected
    assert composed.covers(position) == (position == len(expected))


@given(tiling(sources=2))
def test_coalesce_keeps_every_element_and_leaves_nothing_to_join(drawn: tuple[Runs, int]) -> None:
    runs, size = drawn
    joined = coalesce(runs)
    assert elements(joined) == elements(runs)
    assert joined.covers(size)
    ends = zip(joined.source.tolist(), (joined.source_start + joined.length).tolist(), strict=True)
    begins = zip(joined.source.tolist(), joined.source_start.tolist(), strict=True)
    assert all(end != begin for end, begin in zip(list(ends)[:-1], list(begins)[1:], strict=True))


@given(
    dimensions=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20)), max_size=4),
    offset=st.integers(0, 10),
)
def test_strided_reads_what_numpy_reads(dimensions: list[tuple[int, int]], offset: int) -> None:
    shape = tuple(size for size, _ in dimensions)
    stride = tuple(step for _, step in dimensions)
    memory = np.arange(offset + 1 + sum(size * step for size, step in dimensions), dtype=np.int64)
    view = np.lib.stride_tricks.as_strided(memory[offset:], shape, tuple(step * 8 for step in stride))
    runs = strided(offset, shape, stride, 7)
    assert elements(runs) == [(i, 7, there) for i, there in enumerate(view.reshape(-1).tolist())]
    assert runs.covers(view.size)


@given(st.permutations(range(3)), st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)))
def test_strided_of_a_contiguous_view_is_one_run(order: list[int], shape: tuple[int, int, int]) -> None:
    view = np.empty(shape, dtype=np.int64).transpose(order)
    runs = strided(0, view.shape, tuple(step // 8 for step in view.strides), 0)
    if view.flags.c_contiguous:
        assert len(runs) == 1
    else:
        assert len(runs) > 1


@given(tiling(sources=2), st.integers(0, 7), st.sampled_from(["start", "length"]), st.sampled_from([-1, 1]))
def test_covers_notices_a_gap_an_overlap_and_a_wrong_size(
    drawn: tuple[Runs, int], index: int, column: str, by: int
) -> None:
    runs, size = drawn
    assert runs.covers(size)
    assert not runs.covers(size + 1)
    if not len(runs):
        return
    changed = {name: getattr(runs, name).copy() for name in ("start", "source", "source_start", "length")}
    changed[column][index % len(runs)] += by
    assert not Runs(**changed).covers(size)
