"""The orientation of weights that the Hub's checkpoints have, where Transformers saves another one.

Some conversions transpose a weight only if its shape says so (`Transpose(check_dims=True)`): a load takes both
orientations, and a save, whose shapes always fit, never transposes. So Transformers writes Qwen3-VL-MoE's experts as
they are in the model, `[experts, out, in]`, while its checkpoints on the Hub, and the engines that serve it, have
`[experts, in, out]`. Which models these are is said by their conversions alone.

Source: transformers `core_model_loading.py` (`Transpose.convert`, `revert_weight_conversion`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, Transpose, WeightTransform

from stillframe.errors import UnsupportedModel


@contextmanager
def hub_orientation(model: nn.Module) -> Iterator[None]:
    """While it lasts, `revert_weight_conversion` of `model` also transposes what Transformers does only on a load.

    Raises UnsupportedModel for a model that has no such weights: there is one orientation, and this choice means
    nothing. What `model` is saved with later does not change.
    """
    conversions = [deepcopy(conversion) for conversion in _conversions(model)]
    found = False
    for conversion in conversions:
        for place, operation in enumerate(getattr(conversion, "operations", ())):
            if isinstance(operation, Transpose) and operation.check_dims:
                conversion.operations[place] = _AlwaysTranspose(operation.dim0, operation.dim1)  # type: ignore[attr-defined]
                found = True
    if not found:
        raise UnsupportedModel(
            f"layout='hub' means nothing for {type(model).__name__}, whose weights transformers saves in the only "
            "orientation that there is; leave it out"
        )
    before = model.__dict__.get("_weight_conversions")
    had_any = "_weight_conversions" in model.__dict__
    model.__dict__["_weight_conversions"] = conversions
    try:
        yield
    finally:
        if had_any:
            model.__dict__["_weight_conversions"] = before
        else:
            del model.__dict__["_weight_conversions"]


def _conversions(model: nn.Module) -> Sequence[WeightTransform]:
    """What `revert_weight_conversion` would revert."""
    if not isinstance(model, PreTrainedModel):
        return ()
    own: Sequence[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if own is not None:
        return own
    known = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in known if not isinstance(conversion, PrefixChange)]


class _AlwaysTranspose(Transpose):
    """Transposes whatever the shape says, unless the shape then does not say whether it was done."""

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **context: Any) -> Any:  # type: ignore[override]
        held = next(iter(input_dict.values()))
        shape = (held[0] if isinstance(held, list) else held).shape
        if shape[self.dim0] == shape[self.dim1]:
            raise UnsupportedModel(
                f"layout='hub' would transpose {context['full_layer_name']}, of shape {tuple(shape)}, which a load "
                "could not see from the shape; leave it out"
            )
        transpose: Any = super()
        return transpose.convert(input_dict, *patterns, **context)

    @property
    def reverse_op(self) -> ConversionOps:
        return _AlwaysTranspose(self.dim1, self.dim0)


def order_of_dims(view: torch.Tensor, source: torch.Tensor) -> tuple[int, ...] | None:
    """`dims` such that `view` is all of `source.permute(dims)`; None if it is no such thing.

    `source` must be in row-major order, and have no dimension of size 1: such a one could be anywhere in the order.
    """
    if not source.is_contiguous() or view.dim() != source.dim() or view.dtype != source.dtype or min(source.shape) < 2:
        return None
    place = {stride: dim for dim, stride in enumerate(source.stride())}
    dims = tuple(place.get(stride, -1) for stride in view.stride())
    if sorted(dims) != list(range(source.dim())) or view.storage_offset() != source.storage_offset():
        return None
    return dims if tuple(source.shape[d] for d in dims) == tuple(view.shape) else None
