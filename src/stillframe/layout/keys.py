"""Runtime tensors <-> Hugging Face keys, found by running Transformers' own conversions on shapes alone.

There is no table of models here. `save_keys` runs the very function that `save_pretrained` uses
(`revert_weight_conversion`) on meta tensors, watching which views, copies, concatenations and stacks it makes; the
result says for every key of the checkpoint which runs of which runtime tensors it consists of. What is neither a
rename nor a slice nor a concatenation is recognised (its values would come from a storage that no tensor of the model
owns); of such a key the result says which tensors it is computed from (`layout.computing`).

Source: transformers `core_model_loading.py` (`revert_weight_conversion`) and `modeling_utils.py` (`save_pretrained`).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_utils import _get_tied_weight_keys

from stillframe.errors import UnsupportedModel
from stillframe.layout.computing import Conversion, computed_name, sources_of_computed
from stillframe.layout.orientation import order_of_dims
from stillframe.layout.renaming import KeyMapping
from stillframe.layout.runs import Runs, coalesce, compose, overlap, strided

_MAX_SINGLE_ELEMENTS = 1 << 22  # 128 MiB of runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One tensor of the checkpoint: its name, and the runs of the model's tensors that it consists of.

    `runs` tile the key in row-major order, in elements; `Runs.source` indexes `KeyMap.sources`. With `dims` the key is
    one whole tensor with its dimensions in that order, and `runs` count its elements in the order they then have.
    `block` identifies the storage that `save_pretrained` would hold it in, of `block_bytes` bytes: the unit by which it
    shards files.

    `made_of`: the sources of a key whose values a conversion computes (`layout.computing`); `runs` are then of an array
    of its own.

    `matrix`: for a weight that is saved in fp8 its own name; for its scales the weight's, and the runs then only say
    who writes them.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    runs: Runs
    block: int
    block_bytes: int
    matrix: str | None = None
    dims: tuple[int, ...] | None = None
    made_of: tuple[int, ...] = ()

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMap:
    """`sources` (names of runtime tensors, behind them one for each key that is computed) and the `keys` made of them,
    in the order in which they are sharded."""

    sources: tuple[str, ...]
    keys: tuple[Key, ...]


def runtime_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` would save, as the model's own objects, in `state_dict` order.

    Names in `_keys_to_ignore_on_save` and all but one name of tied weights are left out, by the rules of
    transformers' `remove_tied_weights_from_state_dict`. A module that is no PreTrainedModel declares no ties: there the
    first of the names in their order is kept, as safetensors' `save_model` does. Raises UnsupportedModel for entries
    that are no tensors.
    """
    state = model.state_dict(keep_vars=True)
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModel(
                f"{type(model).__name__}: {name} is a {type(value).__name__}, not a tensor; safetensors cannot hold it"
            )
    return without_tied(model, state)


def without_tied(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keep one name of each group that is one tensor; refuse tensors that overlap without being the same."""
    storages: dict[Hashable, dict[Hashable, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, tensor in state.items():
        storage, extent = address(tensor)
        storages[storage][extent].append(name)
    patterns = _get_tied_weight_keys(model)
    dropped: set[str] = set()
    for extents in storages.values():
        for names in extents.values():
            if isinstance(model, PreTrainedModel):
                tied = [n for n in sorted(names) if any(re.search(p, n) for p in patterns)]
            else:
                tied = sorted(names, reverse=True)
            dropped.update(tied[: len(names) - 1])  # when every name is declared as tied, the last one stays
            kept = [n for n in names if n not in dropped]
            if len(kept) > 1:
                raise UnsupportedModel(
                    f"{type(model).__name__}: {', '.join(sorted(kept))} are one tensor, but _tied_weights_keys "
                    f"({patterns}) does not say which name to keep; declare the tie on the model"
                )
        _refuse_partial_overlap(model, state, [names[0] for names in extents.values()])
    return {name: tensor for name, tensor in state.items() if name not in dropped}


def address(tensor: torch.Tensor) -> tuple[Hashable, Hashable]:
    """What identifies the storage, and the place in it, of the memory that this rank holds of `tensor`."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if local.numel() == 0 or local.device.type == "meta":
        return id(tensor), None  # nothing to point at: only the very same object is the same tensor
    storage = (local.device, local.untyped_storage().data_ptr())
    return storage, (local.data_ptr(), local.numel(), tuple(local.stride()))


def _refuse_partial_overlap(model: nn.Module, state: dict[str, torch.Tensor], names: list[str]) -> None:
    spans = []
    for name in names if len(names) > 1 else ():
        tensor = state[name]
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        last = sum((size - 1) * step for size, step in zip(local.shape, local.stride(), strict=True))
        spans.append((local.data_ptr(), local.data_ptr() + (last + 1) * local.element_size(), name))
    spans.sort()
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise UnsupportedModel(f"{type(model).__name__}: {name} and {other} overlap in memory but are not the same")


def save_keys(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    key_mapping: KeyMapping | None = None,
    twins: dict[str, torch.Tensor] | None = None,
    *,
    hub_layout: bool = False,
) -> KeyMap:
    """The keys that `save_pretrained` of the unsharded `model` writes, as runs over `tensors` (`runtime_tensors`).

    For a module that is no PreTrainedModel these are its own names. `key_mapping` renames the keys at the end.
    `twins`: those of the unsharded tensors where this rank has not all of them (`twins_on_meta`). With `hub_layout`
    weights have the orientation that they have on the Hub (`layout.orientation`).

    Depends on names, shapes and dtypes only; no data is read. A key whose conversion is more than renames, slices and
    concatenations has the tensors that it is made of instead of runs. Raises UnsupportedModel, naming the keys, where
    these cannot be told, or a conversion loses a part of a tensor, or the mapping a key.
    """
    twins = twins_on_meta(tensors) if twins is None else twins
    tracer = Tracer(twins)
    conversion = Conversion(model, hub_layout=hub_layout)
    converted = tracer.run(conversion)
    storages: dict[int, int] = {}
    named = (key_mapping or KeyMapping(rules=())).keys_of(converted)
    keys = []
    turned = {name: found for name, tensor in converted.items() if (found := tracer.turned(tensor)) is not None}
    plain = {name: tensor for name, tensor in converted.items() if name not in turned}
    runs_of, unmapped = _runs_of(tracer, plain)
    made_of = sources_of_computed(conversion, twins, unmapped) if unmapped else {}
    computed = {name: len(tensors) + number for number, name in enumerate(made_of)}
    for name, tensor in converted.items():
        source, dims = turned.get(name, (0, None))
        if name in computed:
            runs_of[name] = Runs.of([(0, computed[name], 0, tensor.numel())])
        storage = tensor.untyped_storage()
        block_bytes = storage.nbytes()
        keys.append(
            Key(
                name=named[name],
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                runs=runs_of[name] if dims is None else Runs.of([(0, source, 0, tensor.numel())]),
                dims=dims,
                made_of=made_of.get(name, ()),
                block=storages.setdefault(storage._cdata, len(storages)) if block_bytes else -1,
                block_bytes=block_bytes,
            )
        )
    _refuse_losses(model, tensors, keys)
    return KeyMap(sources=(*tensors, *map(computed_name, made_of)), keys=tuple(keys))


def _runs_of(
    tracer: Tracer, outputs: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Runs], dict[str, UnsupportedModel]]:
    """The runs of each output, and why others have none."""
    try:
        return dict(zip(outputs, tracer.runs_of_each(outputs), strict=True)), {}
    except UnsupportedModel:
        pass  # one by one, then
    runs_of: dict[str, Runs] = {}
    unmapped: dict[str, UnsupportedModel] = {}
    for name, tensor in outputs.items():
        try:
            runs_of[name] = tracer.runs_of(name, tensor)
        except UnsupportedModel as reason:
            unmapped[name] = reason
    return runs_of, unmapped


def _refuse_losses(model: nn.Module, tensors: Mapping[str, torch.Tensor], keys: Sequence[Key]) -> None:
    """Raise UnsupportedModel unless every element is in exactly one key. What computed keys are made of is left out.

    Transformers does not see to that: of two tensors that its renamings give one name, it saves the first.
    """
    columns = ([key.runs.source for key in keys], [k.runs.source_start for k in keys], [k.runs.length for k in keys])
    source, start, length = (np.concatenate([np.zeros(0, dtype=np.int64), *column]) for column in columns)
    order = np.lexsort((start, source))
    source, start, length = source[order], start[order], length[order]
    borders = np.searchsorted(source, np.arange(len(tensors) + 1))
    wrong = []
    computed = {index for key in keys for index in key.made_of}
    for index, ((name, tensor), (low, high)) in enumerate(
        zip(tensors.items(), pairwise(borders.tolist()), strict=True)
    ):
        own = Runs(start[low:high], source[low:high], start[low:high], length[low:high])
        if index not in computed and not own.covers(tensor.numel()):
            wrong.append(name)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UnsupportedModel(
            f"{type(model).__name__}: its conversions do not save each element of {', '.join(wrong[:5])}{more} exactly "
            "once; of tensors that are renamed to one and the same key, all but one would be lost"
        )


def twins_on_meta(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Data-free twins of the unsharded tensors, each in a storage of its own.

    A tensor alone in its storage keeps the storage's size, which `save_pretrained` counts; where several tensors
    share one, it clones them.
    """
    lodgers = Counter(address(t)[0] for t in tensors.values())
    twins = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) or lodgers[address(tensor)[0]] > 1:
            twins[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        elif tensor.device.type == "meta":
            twins[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        else:
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            storage = torch.empty(elements, dtype=tensor.dtype, device="meta")
            twins[name] = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return twins


class Tracer(TorchFunctionMode):
    """Runs a conversion on meta tensors and finds out which runs of its inputs every output consists of."""

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._inputs = inputs
        self._names = list(inputs)
        # Storages are identified by address; keeping the tensors alive keeps the addresses unique.
        self._alive: list[torch.Tensor] = []
        self._sources = {_storage_id(tensor): index for index, tensor in enumerate(inputs.values())}
        self._joins: dict[int, tuple[tuple[torch.Tensor, ...], int]] = {}
        # What is known to be in a storage: an input, or the result of a join.
        self._origins = {_storage_id(tensor): tensor for tensor in inputs.values()}
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
            if _storage_id(result) != _storage_id(args[0]):  # a copy: a concatenation of one tensor
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
        storage = _storage_id(result)
        self._joins[storage] = (tuple(tensors), dim)
        self._origins[storage] = result
        self._alive.extend(tensors)

    def turned(self, tensor: torch.Tensor) -> tuple[int, tuple[int, ...]] | None:
        """The input that output `tensor` is a copy of with its dimensions in another order, and that order; or None.

        To list the runs of so scattered a copy, most of them of one element, would take far more memory than it has.
        """
        storage = _storage_id(tensor)
        view = tensor
        if storage in self._joins:
            (view, *others), _ = self._joins[storage]
            is_whole = tensor.is_contiguous() and (tensor.shape, tensor.dtype) == (view.shape, view.dtype)
            if others or not is_whole or self._origins[storage]._version:
                return None
        index = self._sources.get(_storage_id(view))
        if index is None or not is_scattered(view.shape, view.stride()):
            return None
        dims = order_of_dims(view, self._origins[_storage_id(view)])
        return None if dims is None else (index, dims)

    def runs_of_each(self, outputs: Mapping[str, torch.Tensor]) -> list[Runs]:
        """`runs_of` for many outputs. Those in row-major order, so nearly all, are worked out together by storage."""
        runs: dict[str, Runs] = {}
        together: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
        for name, tensor in outputs.items():
            storage = _storage_id(tensor)
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
        storage = _storage_id(tensor)
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


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
