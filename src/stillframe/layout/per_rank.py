"""File names where each rank has files of its own: `<prefix>-<4 digits>-save_rank<r>.safetensors`.

For file systems on which many clients must not write one file. A file holds whole tensors, so each key has one owner
(`gather`). The prefix is "model", or for composed models, such as of vision and language, the part that a key is of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from stillframe.layout.keys import Key, KeyMap

# By the names that the parts have in Transformers' models, the innermost that says anything; the rest is language.
_PROJECTOR = re.compile(r"(^|[._])(projector|projection|connector|aligner|merger|merger_list)(\.|$)")
_VISION = re.compile(r"(^|\.)(visual|vision\w*|image\w*|vit|vpm)(\.|$)")


class OwnFile(NamedTuple):
    """A file that `rank` alone writes, and what is in it."""

    name: str
    rank: int
    keys: list[Key]


def own_files(
    model: nn.Module, key_map: KeyMap, owner_of: Mapping[int, int], *, world_size: int, max_shard_bytes: int
) -> list[OwnFile]:
    """The files of all ranks, by rank; of each rank and prefix they are numbered from 1, and none but one with a single
    key is larger than `max_shard_bytes`, its header aside. `owner_of` has the rank of each key, by its number."""
    parts: dict[tuple[int, str], list[Key]] = {}
    for number, key in enumerate(key_map.keys):
        parts.setdefault((owner_of[number], _prefix(model, key, key_map.sources)), []).append(key)
    files = []
    for rank in range(world_size):
        for prefix in sorted(prefix for owner, prefix in parts if owner == rank):
            for index, keys in enumerate(_split(parts[rank, prefix], max_shard_bytes)):
                files.append(OwnFile(f"{prefix}-{index + 1:04d}-save_rank{rank}.safetensors", rank, keys))
    return files


def _prefix(model: nn.Module, key: Key, sources: Sequence[str]) -> str:
    if getattr(getattr(model, "config", None), "vision_config", None) is None:
        return "model"
    indices = key.made_of or key.runs.source.tolist()
    name = sources[indices[0]] if indices else key.name
    if _PROJECTOR.search(name):
        return "projector"
    return "vision" if _VISION.search(name) else "language"


def _split(keys: Sequence[Key], max_shard_bytes: int) -> list[list[Key]]:
    shards: list[list[Key]] = []
    size = 0
    for key in keys:
        if not shards or size + key.size_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += key.size_bytes
    return shards
