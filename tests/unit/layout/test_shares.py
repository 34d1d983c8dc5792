"""Layouts that leave a byte uncovered, or cover one twice, are refused with the file and the place."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stillframe.errors import CoverageError
from stillframe.layout.placement import Holding
from stillframe.layout.runs import Runs
from stillframe.layout.shares import PlacedItem, rank_share
from stillframe.records import FileLayout, Item, Layout, RankShare

HEADER = PlacedItem(file=0, file_offset=0, length_bytes=8, content=b"12345678")
FIRST = PlacedItem(file=0, file_offset=8, length_bytes=20, runs=Runs.of([(0, 0, 0, 2), (2, 1, 0, 3)]), element_bytes=4)
SECOND = PlacedItem(file=0, file_offset=28, length_bytes=12, runs=Runs.of([(0, 0, 2, 3)]), element_bytes=4)
OTHER = PlacedItem(file=1, file_offset=0, length_bytes=4, runs=Runs.of([(0, 1, 3, 1)]), element_bytes=4)
HOLDING = Holding(runs=Runs.of([(0, 0, 0, 5)]), replicas=(0,), signature="")


def share(*items: PlacedItem) -> RankShare:
    files = tuple(
        FileLayout(name=name, size_bytes=size, items=(Item(name="", file_offset=0, length_bytes=size),))
        for name, size in (("one", 40), ("two", 4))
    )
    layout = Layout(format="hf", world_size=1, files=files, inline_files=(), total_bytes=44, digest="d")
    return rank_share(layout, items, ["a", "b"], {"a": HOLDING, "b": HOLDING}, rank=0, plan_id=1)


def test_items_that_tile_their_files_are_taken() -> None:
    copies = share(HEADER, FIRST, SECOND, OTHER).copies
    assert [(c.tensor, c.first_element, c.element_count) for c in copies] == [
        ("a", 0, 2),
        ("b", 0, 3),
        ("a", 2, 3),
        ("b", 3, 1),
    ]


def with_runs(item: PlacedItem, *rows: tuple[int, int, int, int]) -> PlacedItem:
    return replace(item, runs=Runs.of(rows))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((HEADER, FIRST, OTHER), "one: has 40 bytes, of which 28 are covered"),
        ((HEADER, SECOND, FIRST, OTHER), "one: bytes 8 to 28 are covered wrongly"),
        ((HEADER, FIRST, FIRST, SECOND, OTHER), "one: bytes 28 to 8 are covered wrongly"),
        ((HEADER, FIRST, SECOND), "two: has 4 bytes, of which 0 are covered"),
        ((replace(HEADER, content=b"1234567"), FIRST, SECOND, OTHER), "one: the item at offset 0 is not covered"),
        ((HEADER, with_runs(FIRST, (0, 0, 0, 2)), SECOND, OTHER), "one: the item at offset 8 is not covered"),
        ((HEADER, with_runs(FIRST, (0, 0, 0, 6)), SECOND, OTHER), "one: the item at offset 8 is not covered"),
        ((HEADER, FIRST, with_runs(SECOND, (1, 0, 2, 3)), OTHER), "one: the item at offset 28 is not covered"),
        ((HEADER, FIRST, with_runs(SECOND, (0, 0, 2, 1), (2, 0, 4, 2)), OTHER), "one: the item at offset 28 is not"),
        ((HEADER, FIRST, with_runs(SECOND, (0, 0, 2, 2), (1, 0, 4, 1)), OTHER), "one: the item at offset 28 is not"),
        ((HEADER, FIRST, SECOND, with_runs(OTHER)), "two: the item at offset 0 is not covered"),
    ],
    ids=[
        "an item missing",
        "items in the wrong order",
        "an item twice",
        "a file empty",
        "too little content",
        "runs that end early",
        "runs that end late",
        "runs that begin late",
        "a gap between runs",
        "runs that overlap",
        "no runs",
    ],
)
def test_a_byte_that_is_not_covered_once_is_refused(items: tuple[PlacedItem, ...], message: str) -> None:
    with pytest.raises(CoverageError, match=message):
        share(*items)
