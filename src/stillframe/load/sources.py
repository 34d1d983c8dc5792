"""What the runs of a model's tensors point into when they are loaded: stored tensors, and what is computed of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Permutation:
    """A strided view of a stored tensor, in elements, whose neighbours are not neighbours in the file: a transpose."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What runs point into, as a flat array: the stored tensor `key`, or a permutation of it in row-major order."""

    key: str
    permutation: Permutation | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conversion:
    """Stored tensors that are converted together, and how.

    `sources`: their numbers among the sources; `shapes`: theirs, in that order. `run` makes of them, whole, on the CPU
    and in `dtype` (to which Transformers casts before it converts), tensors of the model, by name.
    """

    sources: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    run: Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What runs point into, as a flat array in row-major order: a tensor of the model, as `conversion` makes it."""

    name: str
    shape: tuple[int, ...]
    conversion: Conversion
