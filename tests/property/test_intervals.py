"""What is concluded about all ranks of a mesh dimension without looking at each, against looking at each."""

from __future__ import annotations

import math
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from stillframe.layout.intervals import DimShards, held_along, order_matters, partitions


@st.composite
def shards(draw: st.DrawFn) -> DimShards:
    """A dimension sharded over some mesh dimensions; at most one of them strided, as others are refused before."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    strided = draw(st.integers(-1, len(counts) - 1))
    later = math.prod(counts[strided + 1 :])
    factor = draw(st.one_of(st.just(later), st.integers(1, 6)))
    order = draw(st.permutations(range(4)))
    return tuple((order[i], count, factor if i == strided else 1) for i, count in enumerate(counts))


def all_held(size: int, sharded: DimShards) -> list[list[int]]:
    """The indices that each rank holds, in the order of its local tensor."""
    held = []
    for place in product(*(range(count) for _, count, _ in sharded)):
        coordinate = [0] * 4
        for (mesh_dim, _, _), part in zip(sharded, place, strict=True):
            coordinate[mesh_dim] = part
        intervals = held_along(size, sharded, tuple(coordinate))
        held.append([index for start, length in intervals for index in range(start, start + length)])
    return held


@given(st.integers(0, 60), shards())
def test_every_index_is_held_once(size: int, sharded: DimShards) -> None:
    assert partitions(size, sharded)
    assert sorted(index for held in all_held(size, sharded) for index in held) == list(range(size))


@given(st.integers(0, 60), shards())
def test_the_order_of_cuts_matters_where_a_rank_holds_something_else_by_the_other_order(
    size: int, sharded: DimShards
) -> None:
    first = next((i for i, (_, _, factor) in enumerate(sharded) if factor > 1), None)
    expected = False
    if first is not None and sharded[first][2] == math.prod(count for _, count, _ in sharded[first + 1 :]):
        mesh_dim, count, _ = sharded[first]
        reordered = (*sharded[:first], *sharded[first + 1 :], (mesh_dim, count, 1))
        # Both go through the ranks in the order of their shards, so those of one must be sorted by the other's.
        by_coordinate = [dict(zip(coordinates(one), all_held(size, one), strict=True)) for one in (sharded, reordered)]
        expected = by_coordinate[0] != by_coordinate[1]
    assert order_matters(size, sharded) == expected


def coordinates(sharded: DimShards) -> list[tuple[tuple[int, int], ...]]:
    dims = [mesh_dim for mesh_dim, _, _ in sharded]
    places = product(*(range(count) for _, count, _ in sharded))
    return [tuple(sorted(zip(dims, place, strict=True))) for place in places]


def test_many_ranks_are_no_reason_to_look_at_each() -> None:
    assert partitions(384, ((0, 1 << 20, 64), (1, 64, 1)))
    assert not order_matters(384, ((0, 1 << 20, 64), (1, 64, 1)))
    assert order_matters(63 * 1025 + 1024, ((0, 1024, 64), (1, 64, 1)))
