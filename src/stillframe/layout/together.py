"""An export and a checkpoint of one step over one arena: what both need of a tensor in one dtype is staged once."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from stillframe.layout.computing import Conversion
from stillframe.layout.distcp import DistcpPlan
from stillframe.layout.huggingface import HuggingFacePlan
from stillframe.layout.placement import Holding, Holdings
from stillframe.layout.runs import Runs, overlap
from stillframe.layout.shares import place_in_arena, rank_share
from stillframe.names import TOGETHER
from stillframe.records import Blocks, Copy, Envelope, Extent, FileShare, Gather, Layout, RankShare, WritePlan

HF_DIR = "hf/"
CHECKPOINT_DIR = "checkpoint/"


@dataclass(frozen=True, slots=True, kw_only=True)
class JointShare:
    """What one rank contributes to an export and a checkpoint of the same step.

    Two plans, with the ids that they had, over one arena, and how that is filled. `tensors` has what `copies` name, and
    what `blocks` do, which are there if the export is in fp8, and `gathers`.
    """

    hf: WritePlan
    checkpoint: WritePlan
    copies: tuple[Copy, ...]
    envelopes: tuple[Envelope, ...]
    tensors: Mapping[str, torch.Tensor]
    blocks: Blocks | None = None
    gathers: tuple[Gather, ...] = ()
    conversion: Conversion | None = None

    def compute(
        self, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.dtype]
    ) -> dict[str, torch.Tensor]:
        """What the export's conversion computes, by the names that its tensors have beside the checkpoint's."""
        assert self.conversion is not None, "an export that computes has a conversion"
        made = self.conversion.compute(
            {name.removeprefix(HF_DIR): tensor for name, tensor in tensors.items()},
            {name.removeprefix(HF_DIR): dtype for name, dtype in wanted.items()},
        )
        return {HF_DIR + name: tensor for name, tensor in made.items()}


def plan_together(hf: HuggingFacePlan, checkpoint: DistcpPlan) -> JointShare:
    """Join the plans that this rank made of one model. No communication; all ranks do the same, or none.

    The arena holds the checkpoint's bytes as they were planned, and behind them what only the export needs: its
    headers, what it casts, what the checkpoint leaves out. Of tensors that several ranks hold alike, each rank exports
    what it stages for the checkpoint, which is not what it would write in an export alone.
    """
    share = _following(hf, checkpoint)
    pieces = _pieces(share, hf.tensors)
    staged = _Staged(checkpoint, arriving=_arriving(hf))
    found = [staged.place_of(piece, hf.tensors) for piece in pieces]
    alone = [piece for piece, place in zip(pieces, found, strict=True) if place is None]
    columns = (np.array(column, dtype=np.int64) for column in _columns(alone))
    places, arena_bytes = place_in_arena(*columns, arena_bytes=checkpoint.share.plan.arena_bytes)
    behind = iter(places.tolist())
    moved = [next(behind) if place is None else place for place in found]
    copies, envelopes = list(checkpoint.share.copies), list(checkpoint.share.envelopes)
    for piece, place, moved_to in zip(pieces, found, moved, strict=True):
        if isinstance(piece.origin, Envelope):
            envelopes.append(replace(piece.origin, arena_offset=moved_to))
        elif place is None:
            copies.append(replace(piece.origin, tensor=HF_DIR + piece.origin.tensor, arena_offset=moved_to))
    return JointShare(
        hf=replace(share.plan, arena_bytes=arena_bytes, files=_files(share.plan, pieces, moved)),
        checkpoint=replace(checkpoint.share.plan, arena_bytes=arena_bytes),
        copies=tuple(copies),
        envelopes=tuple(envelopes),
        tensors={**checkpoint.tensors, **{HF_DIR + name: tensor for name, tensor in hf.tensors.items()}},
        blocks=None if hf.blocks is None else _of_export(hf.blocks),
        gathers=tuple(map(_gather_of_export, hf.gathers)),
        conversion=hf.conversion,
    )


def _arriving(hf: HuggingFacePlan) -> frozenset[str]:
    """The export's tensors of which this rank copies what it gets, not what it has."""
    return frozenset(name for gather in hf.gathers for name in (*gather.tensors, *gather.computed))


def _gather_of_export(gather: Gather) -> Gather:
    """`gather` with the names that the export's tensors have beside the checkpoint's."""
    return replace(
        gather,
        pieces=tuple(replace(piece, tensor=HF_DIR + piece.tensor) for piece in gather.pieces),
        tensors=tuple(HF_DIR + name for name in gather.tensors),
        computed=tuple(HF_DIR + name for name in gather.computed),
    )


def _of_export(blocks: Blocks) -> Blocks:
    """`blocks` with the names that the export's tensors have beside the checkpoint's."""
    matrices = {
        name: replace(matrix, patches=tuple(replace(patch, tensor=HF_DIR + patch.tensor) for patch in matrix.patches))
        for name, matrix in blocks.matrices.items()
    }
    return replace(blocks, matrices=matrices)


def as_one(hf: Layout, checkpoint: Layout) -> Layout:
    """One layout with the export in `hf/` and the checkpoint in `checkpoint/`, to be published both or neither."""
    return Layout(
        format=TOGETHER,
        world_size=hf.world_size,
        files=(
            *(replace(file, name=HF_DIR + file.name) for file in hf.files),
            *(replace(file, name=CHECKPOINT_DIR + file.name) for file in checkpoint.files),
        ),
        inline_files=(
            *(replace(file, name=HF_DIR + file.name) for file in hf.inline_files),
            *(replace(file, name=CHECKPOINT_DIR + file.name) for file in checkpoint.inline_files),
        ),
        total_bytes=hf.total_bytes + checkpoint.total_bytes,
        digest=hashlib.sha256(repr((TOGETHER, hf.digest, checkpoint.digest)).encode()).hexdigest(),
        rank_files=tuple(CHECKPOINT_DIR + name for name in checkpoint.rank_files),
        held_back=(
            *(HF_DIR + name for name in hf.held_back),
            *(CHECKPOINT_DIR + name for name in checkpoint.held_back),
        ),
        gathered=hf.gathered,
    )


def share_as_one(joint: JointShare, layout: Layout, *, plan_id: int) -> RankShare:
    """`joint` as the share of `layout`, which `as_one` made: one plan for both."""
    plan = replace(
        joint.hf,
        plan_id=plan_id,
        layout_digest=layout.digest,
        files=(
            *(replace(file, name=HF_DIR + file.name) for file in joint.hf.files),
            *(replace(file, name=CHECKPOINT_DIR + file.name) for file in joint.checkpoint.files),
        ),
    )
    return RankShare(plan=plan, copies=joint.copies, envelopes=joint.envelopes)


def _following(hf: HuggingFacePlan, checkpoint: DistcpPlan) -> RankShare:
    """The export's share if each rank holds, of what both write as it is, what it stages for the checkpoint."""
    rank, world_size = checkpoint.share.plan.rank, checkpoint.layout.world_size
    held = Holdings(rank=rank, world_size=world_size, stages=checkpoint.stages)
    key_of = {id(tensor): key for key, tensor in checkpoint.tensors.items()}
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for copy in checkpoint.share.copies:
        ranges[copy.tensor].append((copy.first_element, copy.element_count))
    as_they_are = {
        source
        for item in hf.items
        if item.runs is not None and item.cast_to is None and item.dims is None
        for source in np.unique(item.runs.source).tolist()
    }
    holdings: dict[str, Holding] = dict(hf.holdings)
    for source in as_they_are:
        name = hf.sources[source]
        tensor = hf.tensors[name]
        if name in hf.owned:
            continue
        if (key := key_of.get(id(tensor))) is not None:
            whole = held.of(key, tensor, is_parameter=key not in checkpoint.rank_0_only)
            runs = _within(whole.runs, sorted(ranges[key]))
            holdings[name] = Holding(runs=runs, replicas=(rank,), signature=whole.signature)
    return rank_share(
        hf.layout,
        hf.items,
        hf.sources,
        holdings,
        rank=rank,
        plan_id=hf.share.plan.plan_id,
        file_ranks=hf.file_ranks,
    )


def _within(runs: Runs, ranges: Sequence[tuple[int, int]]) -> Runs:
    """The part of `runs` (global -> local) that lies in the `ranges` of the local tensor, no run in two of them."""
    table = np.array(ranges, dtype=np.int64).reshape(-1, 2)
    index, _, local, length = overlap(runs.source_start, runs.length, table[:, 0], table[:, 1])
    start = runs.start[index] + (local - runs.source_start[index])
    order = np.argsort(start, kind="stable")
    return Runs(start[order], runs.source[index][order], local[order], length[order])


class _Piece(NamedTuple):
    """Bytes of the export that come from one copy or envelope, and the file (by number in its plan) that they go to."""

    file: int
    file_offset: int
    length: int
    origin: Copy | Envelope


def _columns(pieces: Sequence[_Piece]) -> tuple[list[int], list[int], list[int]]:
    return [p.file for p in pieces], [p.file_offset for p in pieces], [p.length for p in pieces]


def _pieces(share: RankShare, tensors: Mapping[str, torch.Tensor]) -> list[_Piece]:
    """All of a share, in file order: what tiles an extent in the arena tiles it in the file."""
    origins: list[Copy | Envelope] = [*share.copies, *share.envelopes]
    origins.sort(key=lambda origin: origin.arena_offset)
    starts = [origin.arena_offset for origin in origins]
    pieces = []
    for number, file in enumerate(share.plan.files):
        for extent in file.extents:
            position, index = 0, bisect_right(starts, extent.arena_offset) - 1
            while position < extent.length_bytes:
                origin = origins[index]
                assert origin.arena_offset == extent.arena_offset + position, "copies and envelopes tile an extent"
                length = _bytes_of(origin, tensors)
                pieces.append(_Piece(number, extent.file_offset + position, length, origin))
                position += length
                index += 1
    return pieces


def _bytes_of(origin: Copy | Envelope, tensors: Mapping[str, torch.Tensor]) -> int:
    if isinstance(origin, Envelope):
        return len(origin.content)
    dtype: torch.dtype = tensors[origin.tensor].dtype if origin.dtype is None else getattr(torch, origin.dtype)
    return origin.element_count * dtype.itemsize


class _Staged:
    """Which elements of this rank's tensors a checkpoint stages, and where."""

    def __init__(self, checkpoint: DistcpPlan, *, arriving: frozenset[str]) -> None:
        """`arriving`: tensors of the export that come from other ranks, too."""
        self._arriving = arriving
        self._copies: dict[int, list[Copy]] = defaultdict(list)
        for copy in checkpoint.share.copies:
            self._copies[id(checkpoint.tensors[copy.tensor])].append(copy)
        for copies in self._copies.values():
            copies.sort(key=lambda copy: copy.first_element)

    def place_of(self, piece: _Piece, tensors: Mapping[str, torch.Tensor]) -> int | None:
        """Where in the arena the bytes of `piece` are anyway, None if nowhere."""
        wanted = piece.origin
        if isinstance(wanted, Envelope) or wanted.dtype is not None or wanted.dims is not None:
            return None
        if wanted.tensor in self._arriving:
            return None
        tensor = tensors[wanted.tensor]
        copies = self._copies.get(id(tensor), [])
        index = bisect_right(copies, wanted.first_element, key=lambda copy: copy.first_element) - 1
        if index < 0:
            return None
        into = wanted.first_element - copies[index].first_element
        if into + wanted.element_count > copies[index].element_count:
            return None
        return copies[index].arena_offset + into * tensor.dtype.itemsize


def _files(plan: WritePlan, pieces: Sequence[_Piece], places: Sequence[int]) -> tuple[FileShare, ...]:
    """The plan's files with their extents where the pieces are now: cut where neighbours are no longer neighbours."""
    borders = [{extent.file_offset for extent in file.extents} for file in plan.files]
    extents: list[list[Extent]] = [[] for _ in plan.files]
    for piece, place in zip(pieces, places, strict=True):
        of_file = extents[piece.file]
        last = of_file[-1] if of_file else None
        if (
            last is not None
            and piece.file_offset not in borders[piece.file]
            and last.arena_offset + last.length_bytes == place
        ):
            of_file[-1] = replace(last, length_bytes=last.length_bytes + piece.length)
        else:
            of_file.append(Extent(file_offset=piece.file_offset, arena_offset=place, length_bytes=piece.length))
    return tuple(replace(file, extents=tuple(e)) for file, e in zip(plan.files, extents, strict=True))
