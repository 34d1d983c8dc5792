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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from stillframe.errors import UnsupportedModel
from stillframe.layout.computing import Conversion, computed_name, sources_of_computed
from stillframe.layout.renaming import KeyMapping
from stillframe.layout.runs import Runs
from stillframe.layout.runtime import twins_on_meta
from stillframe.layout.tracing import Tracer


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
