"""The tracer: which runs of its inputs each output of a conversion consists of.

A conversion runs on tensors without data. The tracer sees the copies, concatenations and stacks that it makes, and
finds from a view's strides where in its storage it lies. What is made in any other way it refuses, by name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from stillframe.errors import UnsupportedModel
from stillframe.layout.orientation import order_of_dims
from stillframe.layout.runs import Runs, coalesce, compose, overlap, strided

_MAX_SINGLE_ELEMENTS = 1 << 22  # 128 MiB of runs


class Tracer(TorchFunctionMode):
    """Runs a conversion on meta tensors and finds out which runs of its inputs every output consists of."""

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._inputs = inputs
        self._names = list(inputs)
        # Storages are identified by address; keeping the tensors alive keeps the addresses unique.
        self._alive: list[torch.Tensor] = []
        self._sources = {storage_id(tensor): index for index, tensor in enumerate(inputs.values())}
        self._joins: dict[int, tuple[tuple[torch.Tensor, ...], int]] = {}
        # What is known to be in a storage: an input, or the result of a join.
        self._origins = {storage_id(tensor): tensor for tensor in inputs.values()}
        self._tables: dict[int, Runs] = {}

    def run(self, convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        with self:
            outputs = convert(dict(self._inputs))
        changed = [n for n, t in self._inputs.items() if t._version]
        if changed:
            raise UnsupportedModel(f"a conversion changes tensors in place: {', '.join(changed)}")
        self._alive.extend(outputs.values())
        return outputs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.Tensor.contiguous:
            if storage_id(result) != storage_id(args[0]):  # a copy: a concatenation of one tensor
                self._record_join(result, args[:1], 0)
        elif func in (torch.cat, torch.concat, torch.stack):
            tensors: Sequence[torch.Tensor] = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            if func is torch.stack:
                dim %= result.dim()
                tensors = [t.unsqueeze(dim) for t in tensors]
            self._record_join(result, tensors, dim % result.dim())
        return result

    def _record_join(self, result: torch.Tensor, tensors: Sequence[torch.Tensor], dim: int) -> None:
        storage = storage_id(result)
        self._joins[storage] = (tuple(tensors), dim)
        self._origins[storage] = result
        self._alive.extend(tensors)

    def turned(self, tensor: torch.Tensor) -> tuple[int, tuple[int, ...]] | None:
        """The input that output `tensor` is a copy of with its dimensions in another order, and that order; or None.

        To list the runs of so scattered a copy, most of them of one element, would take far more memory than it has.
        """
        storage = storage_id(tensor)
        view = tensor
        if storage in self._joins:
            (view, *others), _ = self._joins[storage]
            is_whole = tensor.is_contiguous() and (tensor.shape, tensor.dtype) == (view.shape, view.dtype)
            if others or not is_whole or self._origins[storage]._version:
                return None
        index = self._sources.get(storage_id(view))
        if index is None or not is_scattered(view.shape, view.stride()):
            return None
        dims = order_of_dims(view, self._origins[storage_id(view)])
        return None if dims is None else (index, dims)

    def runs_of_each(self, outputs: Mapping[str, torch.Tensor]) -> list[Runs]:
        """`runs_of` for many outputs. Those in row-major order, so nearly all, are worked out together by storage."""
        runs: dict[str, Runs] = {}
        together: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
        for name, tensor in outputs.items():
            storage = storage_id(tensor)
            origin = self._origins.get(storage)
            if (
                origin is None
                or not (tensor.dtype == origin.dtype and tensor.numel())
                or not (tensor.is_contiguous() and origin.is_contiguous())
            ):
                runs[name] = self.runs_of(name, tensor)
            else:
                begin = int(tensor.storage_offset() - origin.storage_offset())
                together[storage].append((name, begin, tensor.numel()))
        for storage, views in together.items():
            names, begins, sizes = zip(*views, strict=True)
            source = np.full(len(views), self._sources.get(storage, 0), dtype=np.int64)
            found = Runs(np.zeros_like(source), source, np.array(begins, np.int64), np.array(sizes, np.int64))
            if storage in self._joins:
                found = compose(found, self._join_table(names[0], storage))
            runs.update(zip(names, found.split(), strict=True))
        return [runs[name] for name in outputs]

    def runs_of(self, name: str, tensor: torch.Tensor) -> Runs:
        """The runs of output `tensor` over the inputs, in row-major order. Raises UnsupportedModel, naming it."""
        storage = storage_id(tensor)
        origin = self._origins.get(storage, tensor)
        if tensor.dtype != origin.dtype:
            what = self._names[self._sources[storage]] if storage in self._sources else "a concatenation"
            raise UnsupportedModel(f"{name} takes the bytes of {what}, {origin.dtype}, as {tensor.dtype}")
        if storage in self._sources:
            index, source = self._sources[storage], origin
            shape, stride = tuple(tensor.shape), tuple(tensor.stride())
            if (shape, stride) == (tuple(source.shape), tuple(source.stride())):
                return strided(0, shape, _row_major(shape), index)
            if source.is_contiguous():
                offset = int(tensor.storage_offset() - source.storage_offset())
                return self.runs_of_view(name, index, offset, shape, stride)
            raise UnsupportedModel(f"{name} is a part of {self._names[index]}, whose memory is not in row-major order")
        if storage in self._joins:
            refuse_scattered(name, tensor.shape, tensor.stride())
            view = strided(int(tensor.storage_offset()), tensor.shape, tensor.stride(), 0)
            return compose(view, self._join_table(name, storage))
        raise UnsupportedModel(
            f"{name} is not made of renames, slices and concatenations of tensors "
            "(its conversion computes new values), which stillframe does not support here"
        )

    def runs_of_view(self, name: str, index: int, offset: int, shape: Sequence[int], stride: Sequence[int]) -> Runs:
        """The runs of output `name`, a view of input `index`, whose memory is in row-major order; all in elements."""
        refuse_scattered(name, shape, stride)
        return strided(offset, shape, stride, index)

    def _join_table(self, name: str, storage: int) -> Runs:
        """The runs of the whole result of a concatenation or copy, which is contiguous, over the inputs."""
        if storage not in self._tables:
            result, (tensors, dim) = self._origins[storage], self._joins[storage]
            if result._version or not result.is_contiguous() or any(t.dtype != result.dtype for t in tensors):
                raise UnsupportedModel(
                    f"{name} is a concatenation or copy that is then changed in place, or is not in row-major order, "
                    "or changes dtypes; stillframe does not support such a model yet"
                )
            tensors = tuple(t for t in tensors if t.numel())  # torch.cat takes an empty tensor of any shape
            rows = [math.prod(t.shape[dim:]) for t in tensors]
            outer = math.prod(result.shape[:dim])
            row = sum(rows)
            parts = []
            for tensor, own, before in zip(tensors, rows, np.cumsum(rows) - rows, strict=True):
                runs = self.runs_of(name, tensor)
                cuts = np.arange(outer, dtype=np.int64) * own
                r, c, start, length = overlap(runs.start, runs.length, cuts, np.full(outer, own, dtype=np.int64))
                into = c * row + before + (start - cuts[c])
                parts.append(Runs(into, runs.source[r], runs.source_start[r] + (start - runs.start[r]), length))
            parts = parts or [Runs.of([])]
            starts = np.concatenate([p.start for p in parts])
            order = np.argsort(starts, kind="stable")
            self._tables[storage] = coalesce(
                Runs(
                    starts[order],
                    np.concatenate([p.source for p in parts])[order],
                    np.concatenate([p.source_start for p in parts])[order],
                    np.concatenate([p.length for p in parts])[order],
                )
            )
        return self._tables[storage]


def is_scattered(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether neighbours along the last dimension are no neighbours in memory, as in a transposed view."""
    steps = [step for size, step in zip(shape, stride, strict=True) if size > 1]
    return bool(steps) and steps[-1] != 1


def refuse_scattered(name: str, shape: Sequence[int], stride: Sequence[int], *, hint: str = "") -> None:
    """Raise UnsupportedModel for a view with so many runs of one element that listing them would fill the memory."""
    if is_scattered(shape, stride) and is_too_scattered(shape):
        raise UnsupportedModel(
            f"{name} is a transposed tensor, of shape {tuple(shape)}; stillframe does not support one that large yet"
            f"{hint}"
        )


def is_too_scattered(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape has too many elements for a run each."""
    return math.prod(shape) > _MAX_SINGLE_ELEMENTS


def storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
