"""Which ranks copy a transposed tensor as one, and which element by element."""

from __future__ import annotations

import pytest
import torch

from stillframe.errors import UnsupportedModel
from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.placement import Holding
from stillframe.layout.runs import Runs
from stillframe.layout.turned import settle_turned

SHAPE = (3, 4, 5)


def turned_key(dims: tuple[int, ...], shape: tuple[int, ...] = SHAPE) -> KeyMap:
    size = torch.Size(shape).numel()
    key = Key(
        name="key",
        dtype=torch.float32,
        shape=tuple(shape[d] for d in dims),
        runs=Runs.of([(0, 0, 0, size)]),
        block=0,
        block_bytes=4 * size,
        dims=dims,
    )
    return KeyMap(sources=("tensor",), keys=(key,))


def settled(
    dims: tuple[int, ...], rows: list[tuple[int, int, int]], shape: tuple[int, ...] = SHAPE
) -> tuple[Key, torch.Tensor]:
    """What becomes of a key whose source this rank holds in runs of (start, local start, length)."""
    tensor = torch.empty(shape, device="meta")
    held = Holding(runs=Runs.of([(start, 0, at, n) for start, at, n in rows]), replicas=(0,), signature="")
    (key,) = settle_turned(turned_key(dims, shape), {"tensor": tensor}, {"tensor": held}).keys
    return key, tensor


@pytest.mark.parametrize(
    ("dims", "rows"),
    [
        ((0, 2, 1), [(0, 0, 60)]),
        ((0, 2, 1), [(20, 0, 20)]),
        ((0, 2, 1), [(0, 20, 20), (40, 0, 20)]),
        ((0, 2, 1), []),
        ((2, 1, 0), [(0, 0, 60)]),
    ],
)
def test_a_rank_that_holds_matrices_whole_copies_them_so(
    dims: tuple[int, ...], rows: list[tuple[int, int, int]]
) -> None:
    key, _ = settled(dims, rows)
    assert key.dims == dims
    assert len(key.runs) == 1


@pytest.mark.parametrize(
    ("dims", "rows"),
    [
        ((0, 2, 1), [(0, 0, 10)]),
        ((0, 2, 1), [(10, 0, 20)]),
        ((0, 2, 1), [(0, 10, 20)]),
        ((1, 0, 2), [(0, 0, 20)]),
    ],
)
def test_a_rank_whose_shard_cuts_them_lists_the_elements(
    dims: tuple[int, ...], rows: list[tuple[int, int, int]]
) -> None:
    key, _ = settled(dims, rows)
    assert key.dims is None
    values = torch.arange(60).view(SHAPE)
    pieces = zip(key.runs.source_start.tolist(), key.runs.length.tolist(), strict=True)
    found = torch.cat([values.view(-1)[start : start + length] for start, length in pieces])
    assert torch.equal(found, values.permute(dims).reshape(-1))
    assert key.runs.covers(60)


def test_too_many_elements_are_refused_before_they_fill_the_memory() -> None:
    shape = (4, 100_000, 100_000)
    assert settled((0, 2, 1), [(0, 0, 10**10)], shape)[0].dims == (0, 2, 1)
    with pytest.raises(UnsupportedModel, match=r"key is .*, of shape \(4, 100000, 100000\); .* parts of its matrices"):
        settled((0, 2, 1), [(0, 0, 10**9)], shape)
