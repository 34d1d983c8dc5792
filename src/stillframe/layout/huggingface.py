"""The Hugging Face directory: which keys go into which safetensors file, headers, index.

Byte-identical to `save_pretrained` of the same unsharded model. Sources: transformers `modeling_utils.py`
(`save_pretrained`), huggingface_hub `serialization/_base.py` (`split_state_dict_into_shards_factory`), safetensors
`tensor.rs` (`prepare`: order of tensors, padding).
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from stillframe.errors import LayoutError, UnsupportedModel
from stillframe.layout.casting import Cast, cast_keys, saved_dtype
from stillframe.layout.computing import Conversion
from stillframe.layout.gather import GatherPlan, plan_gathers
from stillframe.layout.keys import Key, KeyMap, runtime_tensors, save_keys
from stillframe.layout.per_rank import OwnFile, own_files
from stillframe.layout.placement import Holding, Holdings
from stillframe.layout.quantizing import held_blocks, quantize_keys
from stillframe.layout.renaming import KeyMapping
from stillframe.layout.reshuffle import ReshufflePlan, plan_reshuffles, share_with_reshuffles
from stillframe.layout.shares import PlacedItem, rank_share
from stillframe.layout.stages import Stages, in_whole_model
from stillframe.layout.turned import settle_turned
from stillframe.records import Blocks, FileLayout, Gather, InlineFile, Item, Layout, RankShare
from stillframe.sketch import Sketch
from stillframe.wrappers import unwrapped_module, without_wrappers

# In the order in which safetensors puts tensors into a file (its Dtype enum, descending).
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK_OF_DTYPE = {dtype: order for order, dtype in enumerate(SAFETENSORS_DTYPES)}
MAX_HEADER_BYTES = 100_000_000  # safetensors refuses to read a longer one


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
    twins = None
    if stages is not None:
        tensors = stages.completed(in_whole_model(model, tensors))
        twins = {name: member.twin() for name, member in stages.items()}
        parameters = {id(tensors[name]): math.prod(m.shape) for name, m in stages.items() if m.is_parameter}
        total_parameters = sum(parameters.values()) + _uncounted(stages)
    key_map = save_keys(model, tensors, key_mapping, twins, hub_layout=hub_layout)
    if cast is not None:
        key_map = cast_keys(model, tensors, key_map, cast, parameters.keys())
    config_dtype = None
    if isinstance(model, PreTrainedModel):
        config_dtype = model.dtype if cast is None else saved_dtype(model, tensors, key_map)
    left_alone = None
    if cast is not None and cast.fp8_but is not None:
        key_map, left_alone = quantize_keys(model, tensors, key_map, (*cast.keep, *cast.fp8_but))
    if stages is not None:
        _refuse_computed(key_map)
    held = Holdings(rank=rank, world_size=world_size, stages=stages)
    holdings: Mapping[str, Holding] = {
        name: held.of(name, tensor, is_parameter=id(tensor) in parameters) for name, tensor in tensors.items()
    }
    gathered = GatherPlan.of_none(tensors, holdings)
    if stages is None:
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
    if may_reshuffle and stages is None:
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
        conversion=Conversion(model, hub_layout=hub_layout),
        exchanges=gathered.exchanges or exchanged.summary is not None,
        owned=gathered.owned,
        file_ranks=file_ranks,
    )


def _refuse_computed(key_map: KeyMap) -> None:
    for key in key_map.keys:
        if key.made_of:
            raise UnsupportedModel(
                f"{key.name} is not made of renames, slices and concatenations of tensors (its conversion computes new "
                "values), which stillframe does not support in stages of a pipeline yet"
            )


def sketch_of(tensors: Mapping[str, torch.Tensor], holdings: Mapping[str, Holding], keys: Iterable[Key]) -> Sketch:
    """What tells this layout from that of a rank with other tensors, or with other options, by tensor. The runs of
    `keys` index `tensors`, in their order."""
    becomes: dict[int, str] = {}
    for key in keys:
        if len(key.runs):
            becomes.setdefault(int(key.runs.source[0]), f"{key.name!r} {key.shape} {key.dtype}")
    return Sketch.of(
        [
            (name, f"{tuple(tensor.shape)} {tensor.dtype} {holdings[name].signature} {becomes.get(index)}")
            for index, (name, tensor) in enumerate(tensors.items())
        ]
    )


def _uncounted(stages: Stages) -> int:
    """The elements of parameters that are not saved; of those that several stages have, once."""
    return sum({name: count for extra in stages.extras for name, count in extra["uncounted"].items()}.values())


def unwrapped(model: nn.Module, *, any_module: bool = False) -> nn.Module:
    """The model inside of its outermost wrappers. Raises UnsupportedModel if it must be a PreTrainedModel and is none:
    only with a key mapping may it be any module."""
    inner = unwrapped_module(model)
    if not any_module and not isinstance(inner, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(inner).__name__} is not a transformers PreTrainedModel, which would say how its files look; "
            "key_mapping={} saves and loads any module under its own names, and its rules rename them"
        )
    return inner


def refuse_unsupported(model: nn.Module) -> None:
    """Raise UnsupportedModel for models whose save is not made of their own tensors."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel(f"{type(model).__name__} is quantized; export the model that it was made from")
    if {"cpu", "disk"} & {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}:
        raise UnsupportedModel(f"{type(model).__name__} has offloaded modules; load it without a device_map")
    unready = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    if unready:
        raise UnsupportedModel(
            f"{type(model).__name__}: {len(unready)} parameters have no values yet (meta device), such as {unready[0]}"
        )


def lay_out(
    key_map: KeyMap,
    holdings: Mapping[str, Holding],
    *,
    source_dtypes: Sequence[torch.dtype],
    max_shard_bytes: int,
    total_parameters: int,
    world_size: int,
    own: Sequence[OwnFile] | None = None,
) -> tuple[Layout, list[PlacedItem]]:
    """Assign keys to files and offsets; with `own`, the files are these. Deterministic: equal arguments, equal result,
    whatever the hash seed."""
    if own is None:
        files, inline = file_keys(key_map.keys, max_shard_bytes, stem="model", total_parameters=total_parameters)
    else:
        files = [(file.name, file.keys) for file in own]
        size = sum(key.size_bytes for key in key_map.keys)
        inline = (_index_of(files, total_parameters=total_parameters, total_size=size),)
    return lay_out_files(
        files,
        key_map.sources,
        holdings,
        source_dtypes=source_dtypes,
        world_size=world_size,
        inline_files=inline,
        held_back=("config.json",),
    )


def file_keys(
    keys: Sequence[Key], max_shard_bytes: int, *, stem: str, total_parameters: int
) -> tuple[list[tuple[str, Sequence[Key]]], tuple[InlineFile, ...]]:
    """Which keys go into which file, by name, as the Hub splits them; and the index, where there are several."""
    shards, block_total = split_into_shards(keys, max_shard_bytes)
    names = _file_names(stem, len(shards))
    if len(shards) < 2:
        return list(zip(names, shards, strict=True)), ()
    files: list[tuple[str, Sequence[Key]]] = list(zip(names, shards, strict=True))
    return files, (_index_of(files, total_parameters=total_parameters, total_size=block_total),)


def _index_of(files: Sequence[tuple[str, Sequence[Key]]], **metadata: int) -> InlineFile:
    text = _index({key.name: name for name, keys in files for key in keys}, **metadata)
    return InlineFile(name="model.safetensors.index.json", content=text.encode())


def lay_out_files(
    named_files: Sequence[tuple[str, Sequence[Key]]],
    sources: Sequence[str],
    holdings: Mapping[str, Holding],
    *,
    source_dtypes: Sequence[torch.dtype],
    world_size: int,
    inline_files: tuple[InlineFile, ...],
    held_back: tuple[str, ...],
) -> tuple[Layout, list[PlacedItem]]:
    """Assign offsets to the keys of each file, which safetensors orders in its own way. As deterministic as
    `lay_out`. `Runs.source` of the keys indexes `sources`, `source_dtypes` are theirs."""
    files: list[FileLayout] = []
    items: list[PlacedItem] = []
    for index, (name, shard) in enumerate(named_files):
        folder = name[: name.rfind("/") + 1]  # files of several folders may have tensors of one name
        ordered = sorted(shard, key=lambda key: (_dtype_rank(key), _utf8(key.name)))
        lengths = [math.prod(key.shape) * key.dtype.itemsize for key in ordered]
        header = _header(name, ordered, lengths)
        items.append(PlacedItem(file=index, file_offset=0, length_bytes=len(header), content=header))
        listed = [Item(name="", file_offset=0, length_bytes=len(header))]
        position = len(header)
        for key, length in zip(ordered, lengths, strict=True):
            items.append(
                PlacedItem(
                    file=index,
                    file_offset=position,
                    length_bytes=length,
                    runs=key.runs,
                    element_bytes=key.dtype.itemsize,
                    cast_to=_cast_to(key, source_dtypes),
                    matrix=key.matrix,
                    are_scales=key.matrix not in (None, key.name),
                    dims=key.dims,
                )
            )
            listed.append(Item(name=folder + key.name, file_offset=position, length_bytes=length))
            position += length
        files.append(FileLayout(name=name, size_bytes=position, items=tuple(listed)))
    digest = hashlib.sha256(repr(("hf", world_size)).encode())
    for placed in items:
        digest.update(placed.content)
    for file in files:
        digest.update(repr((file.name, file.size_bytes)).encode())
    for source in sources:
        digest.update(repr((source, holdings[source].signature)).encode())
    layout = Layout(
        format="hf",
        world_size=world_size,
        files=tuple(files),
        inline_files=inline_files,
        total_bytes=sum(f.size_bytes for f in files),
        digest=digest.hexdigest(),
        held_back=held_back,
    )
    return layout, items


def _cast_to(key: Key, source_dtypes: Sequence[torch.dtype]) -> str | None:
    if not len(key.runs) or (key.matrix is None and source_dtypes[int(key.runs.source[0])] == key.dtype):
        return None
    return str(key.dtype).removeprefix("torch.")


def split_into_shards(keys: Sequence[Key], max_shard_bytes: int) -> tuple[list[list[Key]], int]:
    """The hub's greedy split by storage block, and the sum of all blocks' bytes (the index's `total_size`).

    A block larger than the limit gets a shard of its own at once, while the open shard stays open.
    """
    by_block: dict[int, list[Key]] = {}
    for key in keys:
        by_block.setdefault(key.block, []).append(key)
    shards: list[list[Key]] = []
    current: list[Key] = []
    current_bytes = total_bytes = 0
    for block in by_block.values():
        size = block[0].block_bytes
        total_bytes += size
        if size > max_shard_bytes:
            shards.append(block)
            continue
        if current_bytes + size > max_shard_bytes:
            shards.append(current)
            current, current_bytes = [], 0
        current.extend(block)
        current_bytes += size
    if current:
        shards.append(current)
    return shards, total_bytes


def _file_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _dtype_rank(key: Key) -> int:
    if key.dtype not in _RANK_OF_DTYPE:
        raise UnsupportedModel(f"{key.name} has dtype {key.dtype}, for which safetensors has no name")
    return _RANK_OF_DTYPE[key.dtype]


def _utf8(name: str) -> bytes:
    if name == "__metadata__":
        raise UnsupportedModel(f"{name!r} is no name for a tensor: safetensors keeps it for itself; rename the tensor")
    try:
        return name.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedModel(f"the name {name!r} is not valid Unicode, so safetensors cannot hold it") from error


def _index(weight_map: Mapping[str, str], **metadata: int) -> str:
    """The index as `json.dumps(..., indent=2, sort_keys=True)` makes it, and a newline; json is slow to indent."""

    def indented(part: Mapping[str, object]) -> str:
        return json.dumps(part, sort_keys=True, separators=(",\n    ", ": "))[1:-1]

    return f"""{{
  "metadata": {{
    {indented(metadata)}
  }},
  "weight_map": {{
    {indented(weight_map)}
  }}
}}
"""


def _header(file_name: str, ordered: Sequence[Key], lengths: Sequence[int]) -> bytes:
    """The file's first bytes: u64 length, JSON, spaces up to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, length in zip(ordered, lengths, strict=True):
        entries[key.name] = {
            "dtype": SAFETENSORS_DTYPES[key.dtype],
            "shape": key.shape,
            "data_offsets": (position, position + length),
        }
        position += length
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise LayoutError(
            f"{file_name}: its header would have {len(text)} bytes, more than the {MAX_HEADER_BYTES} that safetensors "
            "reads; choose a smaller max_shard_size"
        )
    return len(text).to_bytes(8, "little") + text
