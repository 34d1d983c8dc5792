from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.records import Extent, FileShare
from stillframe.writer.blocks import DIRECT_ALIGNMENT_BYTES, DIRECT_MIN_BYTES, Block, cut_blocks
from tests.unit.writer.saves import Scenario, scenarios


def make_share(*extents: tuple[int, int, int], size_bytes: int = 64 << 20) -> FileShare:
    """A share from (file offset, arena offset, length) triples."""
    return FileShare(
        name="f",
        size_bytes=size_bytes,
        extents=tuple(Extent(file_offset=f, arena_offset=a, length_bytes=n) for f, a, n in extents),
    )


def cut(share: FileShare, *, arena_bytes: int = 1 << 30, block_bytes: int = 4 << 20) -> tuple[Block, ...]:
    return cut_blocks(share, arena_bytes=arena_bytes, block_bytes=block_bytes).blocks


@given(scenarios(ranks=2), st.sampled_from([4096, 65536, 4 << 20]))
@settings(max_examples=40, deadline=None)
def test_pieces_tile_the_extents_and_direct_blocks_are_whole_pages(scenario: Scenario, block_bytes: int) -> None:
    for plan in scenario.plans:
        for share in plan.files:
            blocks = cut(share, arena_bytes=plan.arena_bytes, block_bytes=block_bytes)
            done_bytes = [0] * len(share.extents)
            for block in blocks:
                assert 0 < block.length_bytes <= block_bytes
                if block.direct:
                    for number in (block.file_offset, block.arena_offset or 0, block.length_bytes):
                        assert number % DIRECT_ALIGNMENT_BYTES == 0
                position = 0
                for piece in block.pieces:
                    extent = share.extents[piece.extent_index]
                    already = done_bytes[piece.extent_index]
                    assert block.file_offset + position == extent.file_offset + already
                    assert piece.arena_offset == extent.arena_offset + already
                    assert block.arena_offset in (None, piece.arena_offset - position)
                    done_bytes[piece.extent_index] += piece.length_bytes
                    position += piece.length_bytes
                assert position == block.length_bytes
            assert done_bytes == [extent.length_bytes for extent in share.extents]


def test_neighbours_in_file_and_arena_are_written_together() -> None:
    (block,) = cut(make_share((10, 110, 20), (30, 130, 5), (35, 135, 70)))
    assert (block.file_offset, block.arena_offset, block.length_bytes) == (10, 110, 95)
    assert [(piece.extent_index, piece.length_bytes) for piece in block.pieces] == [(0, 20), (1, 5), (2, 70)]


def test_neighbours_in_the_file_alone_are_gathered() -> None:
    (block,) = cut(make_share((10, 110, 20), (30, 131, 5), (35, 7, 1)))
    assert (block.file_offset, block.arena_offset, block.length_bytes) == (10, None, 26)
    assert [(piece.arena_offset, piece.length_bytes) for piece in block.pieces] == [(110, 20), (131, 5), (7, 1)]


def test_a_large_run_is_direct_but_for_its_partial_pages() -> None:
    blocks = cut(make_share((4096 + 100, 8192 + 100, 2 << 20)), block_bytes=1 << 20)
    assert [block.direct for block in blocks] == [False, True, True, True, False]
    assert (blocks[0].length_bytes, blocks[-1].length_bytes) == (3996, 100)
    # Between them, blocks end where the file's multiples of the block size do.
    assert [block.file_offset for block in blocks] == [4196, 8192, 1 << 20, 2 << 20, (2 << 20) + 4096]


def test_a_small_run_goes_through_the_page_cache() -> None:
    assert not any(block.direct for block in cut(make_share((0, 0, DIRECT_MIN_BYTES - 1))))


def test_a_large_run_that_lies_askew_is_gathered_for_direct_writes() -> None:
    blocks = cut(make_share((0, 512, 2 << 20)), block_bytes=1 << 20)
    assert [(block.direct, block.arena_offset) for block in blocks] == [(True, None), (True, None)]


@pytest.mark.parametrize(
    ("extents", "complaint"),
    [
        ([(0, 0, 10), (5, 10, 10)], "overlap or are unsorted at offset 5"),
        ([(50, 0, 10), (5, 10, 10)], "overlap or are unsorted at offset 5"),
        ([(0, 0, -1)], "overlap or are unsorted"),
        ([(95, 0, 10)], "ends at 105, past its 100 bytes"),
        ([(0, 995, 10)], "outside the arena: arena offset 995, 10 of 1000 bytes"),
        ([(0, -1, 10)], "outside the arena"),
    ],
)
def test_impossible_extents_are_refused_by_name(extents: list[tuple[int, int, int]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        cut(make_share(*extents, size_bytes=100), arena_bytes=1000)
    assert "'f'" in str(caught.value)
