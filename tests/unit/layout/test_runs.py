from __future__ import annotations

import numpy as np

from stillframe.layout.runs import Runs, coalesce, compose, overlap, strided


def rows(runs: Runs) -> list[tuple[int, ...]]:
    return list(zip(*(c.tolist() for c in (runs.start, runs.source, runs.source_start, runs.length)), strict=True))


def test_no_runs_cover_nothing_and_nothing_else() -> None:
    assert Runs.of([]).covers(0)
    assert not Runs.of([]).covers(1)
    assert len(Runs.of([])) == 0
    assert rows(coalesce(Runs.of([]))) == []
    assert rows(compose(Runs.of([]), Runs.of([(0, 0, 0, 3)]))) == []


def test_an_empty_interval_between_two_overlaps_neither() -> None:
    four, zero = np.array([4]), np.array([0])
    for result in overlap(four, zero, np.array([0, 4]), np.array([4, 4])):
        assert result.tolist() == []


def test_an_expert_of_a_fused_tensor_is_one_run() -> None:
    # gate of expert 2 in gate_up [4 experts, 2 x 3 rows, 5]: rows 0..3 of its 6
    assert rows(strided(2 * 30, (3, 5), (5, 1), 9)) == [(0, 9, 60, 15)]


def test_a_column_block_is_one_run_per_row() -> None:
    assert rows(strided(2, (3, 4), (10, 1), 0)) == [(0, 0, 2, 4), (4, 0, 12, 4), (8, 0, 22, 4)]


def test_a_dimension_of_size_one_does_not_split_runs_whatever_its_stride() -> None:
    assert rows(strided(0, (2, 1, 3), (3, 99, 1), 0)) == [(0, 0, 0, 6)]


def test_a_repeated_row_is_read_again_for_each_repetition() -> None:
    assert rows(strided(5, (3, 2), (0, 1), 0)) == [(0, 0, 5, 2), (2, 0, 5, 2), (4, 0, 5, 2)]


def test_a_scalar_is_one_run_of_one_element() -> None:
    assert rows(strided(3, (), (), 0)) == [(0, 0, 3, 1)]


def test_compose_cuts_a_run_where_the_inner_array_changes_its_source() -> None:
    inner = Runs.of([(0, 0, 100, 4), (4, 1, 200, 4)])
    assert rows(compose(Runs.of([(0, 0, 2, 5)]), inner)) == [(0, 0, 102, 2), (2, 1, 200, 3)]


def test_coalesce_does_not_join_across_sources_or_gaps() -> None:
    separate = [(0, 0, 0, 2), (2, 1, 2, 2), (4, 1, 5, 2), (7, 1, 7, 1)]
    assert rows(coalesce(Runs.of(separate))) == separate
    assert rows(coalesce(Runs.of([(0, 0, 0, 2), (2, 0, 2, 3), (5, 0, 5, 1)]))) == [(0, 0, 0, 6)]
