"""Elements of a view, matrix by matrix."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stillframe.records import Copy
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.copy import Snapshotter, in_matrices


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


class _NewMemory(TorchDispatchMode):
    """How many bytes of tensors that were made inside are alive at most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self._add(made.nbytes)
                weakref.finalize(made.untyped_storage(), self._add, -made.nbytes)
        return result

    def _add(self, count: int) -> None:
        self._bytes += count
        self.peak_bytes = max(self.peak_bytes, self._bytes)


def test_tensors_that_are_not_in_row_major_order_are_copied_one_at_a_time() -> None:
    tensors = {f"t{number}": torch.randn(64, 32 + number).t() for number in range(8)}
    tensors |= {f"plain{number}": torch.randn(64) for number in range(8)}
    copies, expected, place = [], b"", 0
    for half in (0, 1):  # of each tensor two, far apart
        for name, tensor in tensors.items():
            count = tensor.numel() // 2
            copies.append(
                Copy(tensor=name, first_element=half * count, element_count=count, arena_offset=place, dtype=None)
            )
            flat = tensor.contiguous().view(-1)[half * count : (half + 1) * count]
            expected += flat.numpy().tobytes()
            place += flat.nbytes
    arena = Arena(place)
    snapshotter = Snapshotter(tensors, copies, (), arena)
    with _NewMemory() as new:
        snapshotter.copy()
    assert arena.bytes[:place].numpy().tobytes() == expected
    arena.close()
    assert 0 < new.peak_bytes <= max(tensor.nbytes for tensor in tensors.values())
