"""The state of a training run as `torch.distributed.checkpoint` sees it: nested, flattened to dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTree:
    """Model and optimizer as one nested state, `{"model": ..., "optimizer": ...}`, with the keys that torch's own
    `flatten_state_dict` gives its leaves (`model.layers.0.weight`, `optimizer.state.layers.0.weight.exp_avg`).

    `tensors`: the live objects (DTensors, or plain tensors that all ranks hold alike), each once, in order. `aliases`:
    further keys of a tensor -> its key in `tensors`. `rank_0_only`: keys of plain tensors of which rank 0's values
    count, such as buffers. `objects`: what is no tensor, equal on all ranks. `paths`: for every key, aliases included,
    the way to it (the `planner_data` of a DCP directory).
    """

    tensors: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    rank_0_only: frozenset[str]
    objects: Mapping[str, object]
    paths: Mapping[str, KeyPath]
