"""Which keys change their dtype on the way into the files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from stillframe.layout.keys import Key, KeyMap


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Save floating-point parameters as `dtype`; those whose key or runtime name matches one of `keep` as they are.

    With `fp8_but`, the weights of linear layers and experts go on to fp8 from bfloat16, but for what that matches.
    """

    dtype: torch.dtype
    keep: tuple[re.Pattern[str], ...]
    fp8_but: tuple[re.Pattern[str], ...] | None = None


def cast_keys(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    key_map: KeyMap,
    cast: Cast,
    parameters: Collection[int],
) -> KeyMap:
    """`key_map` with the dtypes that its keys have in the files, sharded as the model so cast would be.

    `parameters`: the ids of those of the tensors that are some. Buffers keep their dtype. So do the modules that
    transformers itself keeps in float32 (`_keep_in_fp32_modules_strict`). Every key is matched against every pattern.
    """
    kept_modules = kept_by_transformers(model, "_keep_in_fp32_modules_strict")
    kept_sources = {
        index
        for index, name in enumerate(key_map.sources)
        if name not in tensors  # a computed key's own, of which the tensors that it is made of tell
        or id(tensors[name]) not in parameters
        or not tensors[name].is_floating_point()
        or any(pattern.search(name) for pattern in (*cast.keep, *kept_modules))
    }

    def cast_one(key: Key) -> Key:
        kept = any(pattern.search(key.name) for pattern in cast.keep) or not kept_sources.isdisjoint(
            key.made_of or np.unique(key.runs.source).tolist()
        )
        if kept or key.dtype == cast.dtype or not key.dtype.is_floating_point:
            return key
        block_bytes = key.block_bytes // key.dtype.itemsize * cast.dtype.itemsize
        return replace(key, dtype=cast.dtype, block_bytes=block_bytes)

    return replace(key_map, keys=tuple(cast_one(key) for key in key_map.keys))


def kept_by_transformers(model: nn.Module, *attributes: str) -> list[re.Pattern[str]]:
    """What these lists of the model name, as transformers reads them: "*" for anything, anywhere in the name."""
    named = {m for attribute in attributes for m in getattr(model, attribute, None) or ()}
    return [re.compile(m.replace("*", ".*")) for m in sorted(named)]


def saved_dtype(
    model: PreTrainedModel, parameters: Iterable[torch.Tensor], tensors: Mapping[str, torch.Tensor], keys: KeyMap
) -> torch.dtype:
    """What config.json says: the dtype that the first floating-point one of the model's `parameters`, which are some of
    `tensors`, has in the files."""
    first = next((p for p in parameters if p.is_floating_point()), None)
    for index, name in enumerate(keys.sources):
        if tensors.get(name) is first:
            for key in keys.keys:
                if index in key.runs.source or index in key.made_of:
                    return key.dtype
    return model.dtype
