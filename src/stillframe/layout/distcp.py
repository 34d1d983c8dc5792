"""The directory of `torch.distributed.checkpoint`: which rank writes which chunk of which tensor into which file.

A chunk is a box of a tensor, stored as the whole file that `torch.save` would make of it; the chunks of a rank follow
each other in files of its own, `__<rank>_<n>.distcp`. `.metadata` says where each one is. Source of the format:
torch 2.13 `distributed/checkpoint/filesystem.py` and `metadata.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stillframe.errors import CoverageError, UnsupportedModel
from stillframe.layout.balance import share_out
from stillframe.layout.distcp_metadata import METADATA_NAME, MetadataFiles, StoredChunk
from stillframe.layout.envelope import envelope
from stillframe.layout.placement import Box, Holdings, Spread
from stillframe.layout.runs import Runs
from stillframe.layout.shares import PlacedItem, own_share
from stillframe.layout.stages import Stages
from stillframe.names import rank_state_name
from stillframe.records import FileLayout, Item, Layout, RankShare
from stillframe.sketch import Sketch
from stillframe.tree import StateTree

MAX_FILE_BYTES = 1 << 30
_ENVELOPE_BYTES = 1600
"""About what an envelope has; only for sharing out fairly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistcpPlan:
    """A layout, this rank's share of it, and the tree's own tensors that the snapshot copies from, by key.

    `rank_0_only` is the tree's. `metadata` (rank 0, else None) renders the inline files of each save: `.metadata`,
    and the file of the objects where there are any.
    """

    layout: Layout
    share: RankShare
    tensors: Mapping[str, torch.Tensor]
    rank_0_only: frozenset[str]
    metadata: MetadataFiles | None
    stages: Stages | None = None


class _Chunk(NamedTuple):
    """A box of the tensor at `key`, which is number `order` of the tree."""

    order: int
    key: str
    box: Box


class _File(NamedTuple):
    layout: FileLayout
    chunks: list[StoredChunk]


def plan_distcp(
    tree: StateTree,
    *,
    rank: int,
    world_size: int,
    plan_id: int,
    max_file_bytes: int = MAX_FILE_BYTES,
    stages: Stages | None = None,
) -> DistcpPlan:
    """Lay `tree` out as a DCP directory and find this rank's share. No communication, no data is read.

    A file ends before the chunk that would make it larger than `max_file_bytes`. `stages`: which ranks hold which
    tensors of the tree, where not all hold all. Raises LayoutError (UnsupportedModel,
    UnsupportedPlacement, CoverageError) naming the key.
    """
    for key, tensor in tree.tensors.items():
        if stages is None or rank in stages[key].holders:
            _refuse_unsupported(key, tensor)
    held = Holdings(rank=rank, world_size=world_size, stages=stages)
    spreads = {
        key: held.spread(key, tensor, rank_0_only=key in tree.rank_0_only) for key, tensor in tree.tensors.items()
    }
    planned_ranks = range(world_size) if rank == 0 else range(rank, rank + 1)
    chunks = _chunks_by_rank(tree.tensors, spreads, planned_ranks)
    if rank == 0:
        _prove_whole(tree.tensors, chunks)
    files = {owner: _files_of(owner, chunks[owner], tree.tensors, max_file_bytes) for owner in planned_ranks}
    layouts = tuple(file.layout for owner in planned_ranks for file in files[owner])
    layout = Layout(
        format="checkpoint",
        world_size=world_size,
        files=layouts,
        inline_files=(),
        total_bytes=sum(file.size_bytes for file in layouts),
        digest=_digest(tree, spreads, world_size, max_file_bytes),
        rank_files=tuple(rank_state_name(r) for r in range(world_size)),
        held_back=(METADATA_NAME,),
        sketch=Sketch.of([(key, repr(_described(tree, spreads, key))) for key in tree.tensors]),
    )
    sources = list(tree.tensors)
    own = files[rank]
    share = own_share(
        layout,
        [file.layout for file in own],
        _placed_items(own, {key: index for index, key in enumerate(sources)}, tree.tensors),
        sources,
        rank=rank,
        plan_id=plan_id,
    )
    metadata = None
    if rank == 0:
        stored = [chunk for owner in planned_ranks for file in files[owner] for chunk in file.chunks]
        metadata = MetadataFiles(tree, stored, objects_name=_file_name(0, len(own)))
    return DistcpPlan(
        layout=layout,
        share=share,
        tensors=tree.tensors,
        rank_0_only=tree.rank_0_only,
        metadata=metadata,
        stages=stages,
    )


def _refuse_unsupported(key: str, tensor: torch.Tensor) -> None:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if is_traceable_wrapper_subclass(local) or local.layout != torch.strided or local.is_quantized:
        raise UnsupportedModel(
            f"{key}: is a {type(local).__name__} of layout {local.layout} and dtype {local.dtype}; only plain dense "
            "tensors, and DTensors of them, can be checkpointed"
        )
    if local.device.type == "meta":
        raise UnsupportedModel(f"{key}: has no values yet (meta device)")
    try:
        envelope(local.dtype, ())
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{key}: {error}") from error


def _chunks_by_rank(
    tensors: Mapping[str, torch.Tensor], spreads: Mapping[str, Spread], planned_ranks: range
) -> dict[int, list[_Chunk]]:
    """Who writes what, for each of `planned_ranks`, in the order of the tree."""
    by_replicas: dict[tuple[int, ...], list[_Chunk]] = defaultdict(list)
    for order, (key, spread) in enumerate(spreads.items()):
        for part in spread.parts:
            by_replicas[part.replicas].extend(_Chunk(order, key, box) for box in part.boxes)
    chunks: dict[int, list[_Chunk]] = {rank: [] for rank in planned_ranks}
    for replicas, held in by_replicas.items():
        if len(replicas) == 1:
            chunks[replicas[0]].extend(held)
            continue
        dims = [_cut_dim(chunk.box) for chunk in held]
        boxes = [_rows(chunk.box, dim, tensors[chunk.key]) for chunk, dim in zip(held, dims, strict=True)]
        cuts = share_out(boxes, len(replicas), item_bytes=_ENVELOPE_BYTES)
        for chunk, dim, of_chunk in zip(held, dims, cuts, strict=True):
            for cut in of_chunk:
                writer = replicas[cut.replica]
                if writer in chunks:
                    whole = len(of_chunk) == 1
                    box = chunk.box if whole else chunk.box.rows(dim, cut.first_row, cut.row_count)
                    chunks[writer].append(chunk._replace(box=box))
    for of_rank in chunks.values():
        of_rank.sort(key=lambda chunk: (chunk.order, chunk.box.offsets))
    return chunks


def _cut_dim(box: Box) -> int:
    """The first dimension that can be cut at all. What is before it has size 1, so the pieces stay contiguous."""
    return next((dim for dim, size in enumerate(box.sizes) if size > 1), 0)


def _rows(box: Box, dim: int, tensor: torch.Tensor) -> tuple[int, int]:
    """How many rows a box has along `dim`, and the bytes of each."""
    rows = box.sizes[dim] if box.sizes else 1
    return rows, math.prod(box.sizes[dim + 1 :]) * tensor.dtype.itemsize


def _prove_whole(tensors: Mapping[str, torch.Tensor], chunks: Mapping[int, Sequence[_Chunk]]) -> None:
    """Raise CoverageError unless the chunks of each tensor have as many elements as it has.

    That they are disjoint follows from how they are made: `placement` proves that the parts tile each dimension, and
    cuts tile their box.
    """
    found = dict.fromkeys(tensors, 0)
    for of_rank in chunks.values():
        for chunk in of_rank:
            found[chunk.key] += math.prod(chunk.box.sizes)
    for key, tensor in tensors.items():
        if found[key] != tensor.numel():
            raise CoverageError(f"{key}: has {tensor.numel()} elements, of which ranks would write {found[key]}")


def _files_of(
    rank: int, chunks: Sequence[_Chunk], tensors: Mapping[str, torch.Tensor], max_file_bytes: int
) -> list[_File]:
    files: list[_File] = []
    stored: list[StoredChunk] = []
    position = 0
    for _, key, box in chunks:
        wrapped = envelope(tensors[key].dtype, box.sizes)
        if stored and position + wrapped.total_bytes > max_file_bytes:
            files.append(_file(stored))
            stored, position = [], 0
        stored.append(StoredChunk(key, box, wrapped, _file_name(rank, len(files)), position))
        position += wrapped.total_bytes
    if stored:
        files.append(_file(stored))
    return files


def _file_name(rank: int, number: int) -> str:
    return f"__{rank}_{number}.distcp"


def _file(chunks: list[StoredChunk]) -> _File:
    """A file of these chunks. Between two payloads is one item: the end of an envelope and the start of the next."""
    items = []
    end = 0
    for chunk in chunks:
        payload = chunk.offset + len(chunk.envelope.prefix)
        items.append(Item(name="", file_offset=end, length_bytes=payload - end))
        items.append(Item(name=chunk.name, file_offset=payload, length_bytes=chunk.envelope.payload_bytes))
        end = payload + chunk.envelope.payload_bytes
    size_bytes = chunks[-1].offset + chunks[-1].envelope.total_bytes
    if end < size_bytes:
        items.append(Item(name="", file_offset=end, length_bytes=size_bytes - end))
    return _File(FileLayout(name=chunks[0].file, size_bytes=size_bytes, items=tuple(items)), chunks)


def _placed_items(
    files: Sequence[_File], source_of: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
) -> list[PlacedItem]:
    """The items of this rank's files, and what they consist of."""
    placed = []
    for number, file in enumerate(files):
        items = iter(file.layout.items)
        before = b""
        for chunk in file.chunks:
            start, payload = next(items), next(items)
            runs = chunk.box.local_runs(source_of[chunk.key]) if payload.length_bytes else Runs.of([])
            placed.append(_between(number, start, before + chunk.envelope.prefix))
            placed.append(
                PlacedItem(
                    file=number,
                    file_offset=payload.file_offset,
                    length_bytes=payload.length_bytes,
                    runs=runs,
                    element_bytes=tensors[chunk.key].dtype.itemsize,
                )
            )
            before = chunk.envelope.suffix
        placed += [_between(number, last, before) for last in items]
    return placed


def _between(file: int, item: Item, content: bytes) -> PlacedItem:
    return PlacedItem(file=file, file_offset=item.file_offset, length_bytes=item.length_bytes, content=content)


def _described(tree: StateTree, spreads: Mapping[str, Spread], key: str) -> tuple[object, ...]:
    tensor = tree.tensors[key]
    return key, tuple(tensor.shape), str(tensor.dtype), key in tree.rank_0_only, spreads[key].signature


def _digest(tree: StateTree, spreads: Mapping[str, Spread], world_size: int, max_file_bytes: int) -> str:
    """Of all that decides who writes what where, and what `.metadata` says; the same on all ranks."""
    digest = hashlib.sha256(repr(("checkpoint", torch.__version__, world_size, max_file_bytes)).encode())
    for key in tree.tensors:
        digest.update(repr(_described(tree, spreads, key)).encode())
    digest.update(repr((sorted(tree.aliases.items()), sorted(tree.objects), sorted(tree.paths.items()))).encode())
    return digest.hexdigest()
