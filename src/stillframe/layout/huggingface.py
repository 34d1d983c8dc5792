"""The plan of a Hugging Face directory: its layout, and this rank's share of it.

Byte-identical to `save_pretrained` (transformers `modeling_utils.py`) of the same unsharded model.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from stillframe.layout.casting import Cast, cast_keys, saved_dtype
from stillframe.layout.computing import Conversion
from stillframe.layout.files import lay_out
from stillframe.layout.gather import plan_gathers
from stillframe.layout.keys import Key, save_keys
from stillframe.layout.per_rank import own_files
from stillframe.layout.placement import Holding, Holdings
from stillframe.layout.quantizing import held_blocks, quantize_keys
from stillframe.layout.renaming import KeyMapping
from stillframe.layout.reshuffle import ReshufflePlan, plan_reshuffles, share_with_reshuffles
from stillframe.layout.runtime import refuse_unsupported, runtime_tensors
from stillframe.layout.shares import PlacedItem, rank_share
from stillframe.layout.stages import Stages, in_whole_model
from stillframe.layout.turned import settle_turned
from stillframe.layout.whole import tensors_of_whole, whole_model
from stillframe.records import Blocks, Gather, Layout, RankShare
from stillframe.sketch import Sketch
from stillframe.wrappers import without_wrappers


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFacePlan:
    """A layout, this rank's share of it, and the model's own tensors that the snapshot copies from, by name.

    `config_dtype` is the model's dtype in the files, as config.json says it; None for a module that is no
    PreTrainedModel and has no config. `items`, `sources` and `holdings` are what
    the share was made of, for a save that shares it out otherwise (`together`). `blocks` and `left_alone` (modules, as
    config.json names them) are those of a plan in fp8, else None. `gathers` are what this rank exchanges with others
    (`exchanges`: some rank does), `conversion` makes of it what is computed, and `owned` are the tensors that their
    owners alone count as holding. Of `file_ranks` each has the file of that number to itself; None: whoever holds a
    part of a file writes it.
    """

    layout: Layout
    share: RankShare
    tensors: Mapping[str, torch.Tensor]
    config_dtype: torch.dtype | None
    items: Sequence[PlacedItem]
    sources: Sequence[str]
    holdings: Mapping[str, Holding]
    blocks: Blocks | None = None
    left_alone: tuple[str, ...] | None = None
    gathers: Sequence[Gather] = ()
    conversion: Conversion | None = None
    exchanges: bool = False
    owned: frozenset[str] = frozenset()
    file_ranks: Sequence[int] | None = None


def plan_huggingface(
    model: nn.Module,
    *,
    max_shard_bytes: int,
    rank: int,
    world_size: int,
    plan_id: int,
    cast: Cast | None = None,
    key_mapping: KeyMapping | None = None,
    hub_layout: bool = False,
    stages: Stages | None = None,
    per_rank: bool = False,
    may_reshuffle: bool = False,
) -> HuggingFacePlan:
    """Lay `model` out as a Hugging Face directory and find this rank's share. No communication, no data is read.

    `cast` None saves every tensor in the dtype that it has. `key_mapping` renames keys after Transformers' conversions.
    `hub_layout` gives weights the orientation that they have on the Hub, where Transformers saves another one.
    `stages`: the whole model, where this rank's is one stage of it. With `per_rank` each rank has files of its own.
    With `may_reshuffle` the snapshot exchanges tensors among ranks whose shards would be short runs (`reshuffle`).

    Raises LayoutError (UnsupportedModel, UnsupportedPlacement, CoverageError) naming the model or tensor.
    """
    with without_wrappers(model), without_collections():
        refuse_unsupported(model)
        return _plan(
            model,
            max_shard_bytes=max_shard_bytes,
            rank=rank,
            world_size=world_size,
            plan_id=plan_id,
            cast=cast,
            key_mapping=key_mapping,
            hub_layout=hub_layout,
            stages=stages,
            per_rank=per_rank,
            may_reshuffle=may_reshuffle,
        )


@contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection meanwhile. A plan is many small objects that stay, none of them in a cycle: they set off
    collections, which walk through all objects of the process and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _plan(
    model: nn.Module,
    *,
    max_shard_bytes: int,
    rank: int,
    world_size: int,
    plan_id: int,
    cast: Cast | None,
    key_mapping: KeyMapping | None,
    hub_layout: bool,
    stages: Stages | None,
    per_rank: bool,
    may_reshuffle: bool,
) -> HuggingFacePlan:
    tensors = runtime_tensors(model)
    parameters = {id(p): p.numel() for p in model.parameters()}
    total_parameters = sum(parameters.values())
    twins, whole = None, model
    in_order: list[torch.Tensor] = list(model.parameters())
    if stages is not None:
        whole = whole_model(model)
        tensors = stages.completed(in_whole_model(model, tensors))
        twins = {name: member.twin() for name, member in stages.items()}
        parameters = {id(tensors[name]): math.prod(m.shape) for name, m in stages.items() if m.is_parameter}
        in_order = [tensors[name] for name, member in stages.items() if member.is_parameter]
        total_parameters = sum(parameters.values()) + stages.uncounted
    key_map = save_keys(whole, tensors, key_mapping, twins, hub_layout=hub_layout)
    if cast is not None:
        key_map = cast_keys(model, tensors, key_map, cast, parameters.keys())
    config_dtype = None
    if isinstance(model, PreTrainedModel):
        config_dtype = model.dtype if cast is None else saved_dtype(model, in_order, tensors, key_map)
    left_alone = None
    if cast is not None and cast.fp8_but is not None:
        of_whole = tensors if whole is model or stages is None else tensors_of_whole(whole, stages)
        key_map, left_alone = quantize_keys(whole, of_whole, key_map, (*cast.keep, *cast.fp8_but))
    held = Holdings(rank=rank, world_size=world_size, stages=stages)
    holdings: Mapping[str, Holding] = {
        name: held.of(name, tensor, is_parameter=id(tensor) in parameters) for name, tensor in tensors.items()
    }
    gathered = plan_gathers(
        key_map,
        tensors,
        held,
        holdings,
        rank=rank,
        world_size=world_size,
        buffers=frozenset(name for name, tensor in tensors.items() if id(tensor) not in parameters),
        every_key=per_rank,
    )
    tensors, holdings = dict(gathered.tensors), gathered.holdings
    exchanged = ReshufflePlan.of_none(holdings)
    if may_reshuffle:
        exchanged = plan_reshuffles(key_map, tensors, holdings, held, leave=gathered.owned)
    key_map, holdings = settle_turned(key_map, tensors, holdings), exchanged.holdings
    own = None
    if per_rank:
        own = own_files(model, key_map, gathered.owner_of, world_size=world_size, max_shard_bytes=max_shard_bytes)
    layout, items = lay_out(
        key_map,
        holdings,
        source_dtypes=[tensors[name].dtype for name in key_map.sources],
        max_shard_bytes=max_shard_bytes,
        total_parameters=total_parameters,
        world_size=world_size,
        own=own,
    )
    file_ranks = None if own is None else [file.rank for file in own]
    layout = replace(
        layout,
        sketch=sketch_of(tensors, holdings, key_map.keys),
        reshuffled=exchanged.summary,
        gathered=gathered.summary,
    )
    share = rank_share(layout, items, key_map.sources, holdings, rank=rank, plan_id=plan_id, file_ranks=file_ranks)
    if exchanged.reshuffles:
        share = share_with_reshuffles(share, exchanged.reshuffles, tensors)
    return HuggingFacePlan(
        layout=layout,
        share=share,
        tensors=tensors,
        config_dtype=config_dtype,
        items=items,
        sources=key_map.sources,
        holdings=holdings,
        blocks=None if left_alone is None else held_blocks(key_map, tensors, held, holdings),
        left_alone=left_alone,
        gathers=gathered.gathers,
        conversion=Conversion(whole, hub_layout=hub_layout),
        exchanges=gathered.exchanges or exchanged.summary is not None,
        owned=gathered.owned,
        file_ranks=file_ranks,
    )


def sketch_of(tensors: Mapping[str, torch.Tensor], holdings: Mapping[str, Holding], keys: Iterable[Key]) -> Sketch:
    """What tells this layout from that of a rank with other tensors, or with other options, by tensor. The runs of
    `keys` index `tensors`, in their order."""
    becomes: dict[int, list[str]] = {}
    for key in keys:
        if len(key.runs):
            becomes.setdefault(int(key.runs.source[0]), []).append(f"{key.name!r} {key.shape} {key.dtype}")
    return Sketch.of(
        [
            (name, f"{tuple(tensor.shape)} {tensor.dtype} {holdings[name].signature} {becomes.get(index)}")
            for index, (name, tensor) in enumerate(tensors.items())
        ]
    )
