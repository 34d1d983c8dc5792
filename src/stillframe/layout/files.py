"""Keys become files: which key goes into which safetensors file and where, the headers, the index.

Sources: huggingface_hub `serialization/_base.py` (`split_state_dict_into_shards_factory`), safetensors `tensor.rs`
(`prepare`: order of tensors, padding).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import torch

from stillframe.errors import LayoutError, UnsupportedModel
from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.per_rank import OwnFile
from stillframe.layout.placement import Holding
from stillframe.layout.shares import PlacedItem
from stillframe.records import FileLayout, InlineFile, Item, Layout

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


def _index_of(files: Sequence[tuple[str, Sequence[Key]]], **metadata: int) -> InlineFile:
    text = _index({key.name: name for name, keys in files for key in keys}, **metadata)
    return InlineFile(name="model.safetensors.index.json", content=text.encode())


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


def _cast_to(key: Key, source_dtypes: Sequence[torch.dtype]) -> str | None:
    if not len(key.runs) or (key.matrix is None and source_dtypes[int(key.runs.source[0])] == key.dtype):
        return None
    return str(key.dtype).removeprefix("torch.")


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
