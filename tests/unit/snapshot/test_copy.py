"""Elements of a view, matrix by matrix."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from stillframe.snapshot.copy import in_matrices


@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_any_range_of_a_view_is_found_in_its_order(data: st.DataObject, sizes: list[int]) -> None:
    elements = math.prod(sizes)
    dims = data.draw(st.permutations(range(len(sizes))))
    view = torch.arange(elements).view(sizes).permute(dims)
    first = data.draw(st.integers(0, elements))
    count = data.draw(st.integers(0, elements - first))
    found = list(in_matrices(view, first, count))
    assert all(1 <= matrix.dim() <= 2 and matrix.numel() for matrix in found)
    assert [value for matrix in found for value in matrix.reshape(-1).tolist()] == view.reshape(-1).tolist()[
        first : first + count
    ]


def test_what_is_whole_is_as_many_views_as_there_are_matrices() -> None:
    view = torch.arange(60).view(3, 4, 5).transpose(1, 2)
    assert [tuple(matrix.shape) for matrix in in_matrices(view, 0, 60)] == [(5, 4)] * 3
    # From the middle of a row to the middle of another: the rest of a row, rows, a matrix, a row, a part of one.
    shapes = [tuple(matrix.shape) for matrix in in_matrices(view, 6, 40)]
    assert shapes == [(2,), (3, 4), (5, 4), (1, 4), (2,)]
