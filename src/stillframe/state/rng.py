"""The states of all random number generators of this process: torch's on the CPU and on CUDA, Python's, NumPy's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from stillframe.errors import CorruptCheckpoint


def capture() -> dict[str, Any]:
    """The states, made of plain values and tensors alone, so that `torch.load(weights_only=True)` reads them."""
    version, numbers, gauss_next = random.getstate()
    kind, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss_next],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached_gaussian),
        ],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put `capture`'s states back. Raises CorruptCheckpoint where they are none; nothing is changed then.

    A CUDA state is put into the current device, where there is one.
    """
    before = capture()
    try:
        version, numbers, gauss_next = state["python"]
        kind, keys, position, has_gauss, cached_gaussian = state["numpy"]
        random.setstate((version, tuple(numbers), gauss_next))
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if before is not state:
            restore(before)
        raise CorruptCheckpoint(f"the saved random state is none ({type(error).__name__}: {error})") from error
