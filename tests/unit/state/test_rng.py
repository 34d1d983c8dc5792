"""Every generator goes on exactly where it was."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from stillframe.errors import CorruptCheckpoint
from stillframe.state import rng


def draws() -> list[float]:
    return [random.random(), random.gauss(), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]


@pytest.mark.parametrize("burn", [0, 1, 700], ids=str)  # 624 numbers make Python and NumPy refill their tables
def test_draws_go_on_where_they_were(burn: int) -> None:
    for _ in range(burn):
        draws()
    buffer = io.BytesIO()
    torch.save(rng.capture(), buffer)
    expected = [draws() for _ in range(3)]
    buffer.seek(0)
    rng.restore(torch.load(buffer, weights_only=True))
    assert [draws() for _ in range(3)] == expected


@pytest.mark.parametrize("change", [{"torch": torch.zeros(3)}, {"python": [3, [1], None]}, {"numpy": None}])
def test_what_is_no_state_changes_nothing(change: dict[str, Any]) -> None:
    before = rng.capture()
    expected = draws()
    rng.restore(before)
    with pytest.raises(CorruptCheckpoint, match="the saved random state is none"):
        rng.restore({**rng.capture(), **change})
    assert draws() == expected
