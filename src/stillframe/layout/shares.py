"""A layout and a distribution -> this rank's share: which bytes of which file it writes, from where in its arena.

Every rank computes its own share alone. Together the shares cover every byte of every file exactly once, because each
step partitions: the items tile their file, their runs tile the items, the holdings of the ranks tile each tensor
(proven per dimension in `placement`), and what several ranks hold alike is cut into parts (`balance`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stillframe.errors import CoverageError
from stillframe.layout.balance import fair_part
from stillframe.layout.placement import Holding
from stillframe.layout.runs import Ints, Runs, overlap
from stillframe.records import (
    Copy,
    Envelope,
    Extent,
    FileLayout,
    FileShare,
    Layout,
    QuantizedCopy,
    RankShare,
    ScalesCopy,
    WritePlan,
)

_PAGE_BYTES = 4096
_LINE_BYTES = 64
_PAGE_ALIGN_FROM_BYTES = 1 << 19  # from here on the writer uses direct I/O


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedItem:
    """An item of a file and what it consists of: an envelope's `content`, or `runs` of elements of tensors.

    `element_bytes` is the size of an element in the file; `cast_to` torch's name of its dtype there, None where it is
    the tensors' own. `matrix`: the key of a weight that is saved in fp8, for the item of the weight and for that of its
    scales (`are_scales`). With `dims` the runs are of a tensor with its dimensions in that order, of which ranks hold
    the same runs as of the tensor itself.
    """

    file: int
    file_offset: int
    length_bytes: int
    content: bytes = b""
    runs: Runs | None = None
    element_bytes: int = 1
    cast_to: str | None = None
    matrix: str | None = None
    are_scales: bool = False
    dims: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Pieces:
    """Columns of runs: where in which file, how many bytes, of which item, from which element of which source.

    Source -1 is the item's own content. Elements are counted in this rank's local part of the source.
    """

    file: Ints
    file_offset: Ints
    length: Ints
    item: Ints
    source: Ints
    element: Ints

    def take(self, index: Ints) -> Pieces:
        return Pieces(*(column[index] for column in self.columns()))

    def columns(self) -> tuple[Ints, ...]:
        return (self.file, self.file_offset, self.length, self.item, self.source, self.element)

    def in_file_order(self) -> Pieces:
        return self.take(np.lexsort((self.file_offset, self.file)))

    @staticmethod
    def concatenate(parts: Sequence[Pieces]) -> Pieces:
        return Pieces(*(np.concatenate(columns) for columns in zip(*(p.columns() for p in parts), strict=True)))


def rank_share(
    layout: Layout,
    items: Sequence[PlacedItem],
    sources: Sequence[str],
    holdings: Mapping[str, Holding],
    *,
    rank: int,
    plan_id: int,
    file_ranks: Sequence[int] | None = None,
) -> RankShare:
    """The share of `rank` in `layout`. `items` are those of `layout.files`, in order; `Runs.source` indexes `sources`.

    Envelopes go round robin over the ranks, or to `file_ranks`, the one of each file. Raises CoverageError if items do
    not tile their files.
    """
    element_bytes = _column(items, "element_bytes")
    held = _held(_proven_runs(layout.files, items), element_bytes, [holdings[name] for name in sources])
    file_ranks = range(layout.world_size) if file_ranks is None else file_ranks
    mine = [_envelopes(items, [i for i, item in enumerate(items) if file_ranks[item.file % len(file_ranks)] == rank])]
    for replicas, pieces in held.items():
        pieces = pieces.in_file_order()
        if len(replicas) > 1:
            index, skip, length = fair_part(
                pieces.file_offset, pieces.length, part=replicas.index(rank), parts=len(replicas)
            )
            part = pieces.take(index)
            skipped = skip // element_bytes[part.item]
            pieces = Pieces(part.file, part.file_offset + skip, length, part.item, part.source, part.element + skipped)
        mine.append(pieces)
    return _staged(layout, layout.files, Pieces.concatenate(mine), items, sources, rank=rank, plan_id=plan_id)


def own_share(
    layout: Layout,
    files: Sequence[FileLayout],
    items: Sequence[PlacedItem],
    sources: Sequence[str],
    *,
    rank: int,
    plan_id: int,
) -> RankShare:
    """The share of a rank that writes `files` of `layout` alone. `items` are those of `files`, in order, and their runs
    point into this rank's local parts of `sources`.

    Raises CoverageError if items do not tile their files.
    """
    runs = _proven_runs(files, items)
    held = replace(runs, length=runs.length * _column(items, "element_bytes")[runs.item])
    whole = Pieces.concatenate([_envelopes(items, range(len(items))), held])
    return _staged(layout, files, whole, items, sources, rank=rank, plan_id=plan_id)


def _staged(
    layout: Layout,
    files: Sequence[FileLayout],
    pieces: Pieces,
    items: Sequence[PlacedItem],
    sources: Sequence[str],
    *,
    rank: int,
    plan_id: int,
) -> RankShare:
    """`pieces` with their places in the arena: how it is filled, and what the writer makes of it."""
    pieces = pieces.in_file_order()
    arena_offset, arena_bytes = place_in_arena(pieces.file, pieces.file_offset, pieces.length)
    copies: list[Copy] = []
    envelopes = []
    for place, length, number, source, element, file_offset in zip(
        *(c.tolist() for c in (arena_offset, pieces.length, pieces.item, pieces.source, pieces.element)),
        pieces.file_offset.tolist(),
        strict=True,
    ):
        item = items[number]
        if source < 0:
            envelopes.append(Envelope(arena_offset=place, content=item.content))
        elif item.matrix is None:
            copies.append(
                Copy(
                    tensor=sources[source],
                    first_element=element,
                    element_count=length // item.element_bytes,
                    arena_offset=place,
                    dtype=item.cast_to,
                    dims=item.dims,
                )
            )
        else:
            copies.append(
                (ScalesCopy if item.are_scales else QuantizedCopy)(
                    tensor=sources[source],
                    first_element=element,
                    element_count=length // item.element_bytes,
                    arena_offset=place,
                    dtype=item.cast_to,
                    matrix=item.matrix,
                    position=(file_offset - item.file_offset) // item.element_bytes,
                )
            )
    plan = WritePlan(
        plan_id=plan_id,
        rank=rank,
        world_size=layout.world_size,
        layout_digest=layout.digest,
        arena_bytes=arena_bytes,
        files=_file_shares(files, pieces, arena_offset),
    )
    return RankShare(plan=plan, copies=tuple(copies), envelopes=tuple(envelopes))


def _column(items: Sequence[PlacedItem], name: str) -> Ints:
    return np.array([getattr(item, name) for item in items], dtype=np.int64)


def _joined(runs: Sequence[Runs], name: str) -> Ints:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(getattr(r, name) for r in runs)])


def _runs_of(items: Sequence[PlacedItem]) -> Pieces:
    """The runs of all items, in order. Their `length` is in elements, and `element` counts in the whole tensor."""
    runs = [item.runs for item in items if item.runs is not None]
    index = np.array([i for i, item in enumerate(items) if item.runs is not None], dtype=np.int64)
    item = np.repeat(index, np.array([len(r) for r in runs], dtype=np.int64))
    file, begin, unit = (_column(items, name)[item] for name in ("file", "file_offset", "element_bytes"))
    start, source, element, length = (_joined(runs, name) for name in ("start", "source", "source_start", "length"))
    return Pieces(file, begin + start * unit, length, item, source, element)


def _proven_runs(files: Sequence[FileLayout], items: Sequence[PlacedItem]) -> Pieces:
    """`_runs_of` the items. Raises CoverageError unless the items tile every file from its first byte to its last, and
    their runs or their content every item."""
    runs = _runs_of(items)
    ends = [0] * len(files)
    for item in items:
        if item.file_offset != ends[item.file]:
            name = files[item.file].name
            raise CoverageError(f"{name}: bytes {ends[item.file]} to {item.file_offset} are covered wrongly")
        ends[item.file] += item.length_bytes
    for file, end in zip(files, ends, strict=True):
        if end != file.size_bytes:
            raise CoverageError(f"{file.name}: has {file.size_bytes} bytes, of which {end} are covered")
    begin, size, unit = (_column(items, name) for name in ("file_offset", "length_bytes", "element_bytes"))
    # Laid end to end, the runs of an item must each begin where those before it in the item end.
    laid = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(runs.length * unit[runs.item])])
    border = np.searchsorted(runs.item, np.arange(len(items) + 1))
    before = laid[border[:-1]]
    wrong = laid[border[1:]] - before + np.array([len(item.content) for item in items], dtype=np.int64) != size
    wrong[runs.item[runs.file_offset - begin[runs.item] != laid[:-1] - before[runs.item]]] = True
    for index in np.flatnonzero(wrong)[:1].tolist():
        name, offset = files[items[index].file].name, items[index].file_offset
        raise CoverageError(f"{name}: the item at offset {offset} is not covered by its parts")
    return runs


def _envelopes(items: Sequence[PlacedItem], index: Sequence[int]) -> Pieces:
    """Those of the items of these numbers that are envelopes, each whole."""
    rows = [
        (items[i].file, items[i].file_offset, items[i].length_bytes, i, -1, 0) for i in index if items[i].runs is None
    ]
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    return Pieces(*(table[:, c] for c in range(6)))


def _held(wanted: Pieces, element_bytes: Ints, holdings: Sequence[Holding]) -> dict[tuple[int, ...], Pieces]:
    """What this rank holds of `wanted`, by the ranks that hold the same; `holdings` are those of the sources, in order.

    All sources at once, as if they were one array after the other, each of the same size: one that is larger than any.
    """
    runs = [holding.runs for holding in holdings]
    counts = np.array([len(r) for r in runs], dtype=np.int64)
    start, local, length = (_joined(runs, name) for name in ("start", "source_start", "length"))
    spacing = max((wanted.element + wanted.length).max(initial=0), (start + length).max(initial=0)) + 1
    begin = start + np.repeat(np.arange(len(holdings), dtype=np.int64), counts) * spacing
    place = wanted.element + wanted.source * spacing
    a, b, found, count = overlap(place, wanted.length, begin, length)
    part = wanted.take(a)
    unit = element_bytes[part.item]
    file_offset = part.file_offset + (found - place[a]) * unit
    pieces = Pieces(part.file, file_offset, count * unit, part.item, part.source, local[b] + (found - begin[b]))
    # A group of replicas may have as many members as the job has ranks: each tuple is hashed once, not once per source.
    by_id = {id(holding.replicas): holding.replicas for holding in holdings}
    groups = {replicas: number for number, replicas in enumerate(dict.fromkeys(by_id.values()))}
    number_of = {key: groups[replicas] for key, replicas in by_id.items()}
    numbers = np.array([number_of[id(holding.replicas)] for holding in holdings], dtype=np.int64)
    group = np.repeat(numbers, counts)[b]
    return {replicas: pieces.take(np.flatnonzero(group == number)) for replicas, number in groups.items()}


def place_in_arena(file: Ints, file_offset: Ints, length: Ints, *, arena_bytes: int = 0) -> tuple[Ints, int]:
    """Where in the arena pieces of files lie that are in file order, and how large it is with them: neighbours in a
    file are neighbours in memory. What is there already has `arena_bytes`.

    A long run starts at the same offset within a page as it has in its file, which direct I/O needs; a short one
    at the same offset within a cache line, which keeps every element aligned.
    """
    n = len(file)
    if n == 0:
        return np.zeros(0, dtype=np.int64), arena_bytes
    continues = (file[1:] == file[:-1]) & (file_offset[1:] == (file_offset + length)[:-1])
    heads = np.flatnonzero(np.concatenate(([True], ~continues)))
    run_length = np.add.reduceat(length, heads)
    position, starts = arena_bytes, []
    for start, run_bytes in zip(file_offset[heads].tolist(), run_length.tolist(), strict=True):
        grain = _PAGE_BYTES if run_bytes >= _PAGE_ALIGN_FROM_BYTES else _LINE_BYTES
        position += (start - position) % grain
        starts.append(position)
        position += run_bytes
    run_of = np.repeat(np.arange(len(heads)), np.diff(np.append(heads, n)))
    into_run = file_offset - file_offset[heads][run_of]
    return np.array(starts, dtype=np.int64)[run_of] + into_run, position


def _file_shares(files: Sequence[FileLayout], pieces: Pieces, arena_offset: Ints) -> tuple[FileShare, ...]:
    """Pieces as extents: neighbours of one item become one extent, of different items stay apart (one CRC each)."""
    extents: dict[int, list[Extent]] = defaultdict(list)
    if len(pieces.file):
        ends = pieces.file_offset + pieces.length
        joins = (pieces.item[1:] == pieces.item[:-1]) & (pieces.file_offset[1:] == ends[:-1])
        heads = np.flatnonzero(np.concatenate(([True], ~joins)))
        lengths = np.add.reduceat(pieces.length, heads)
        for file, file_offset, place, length in zip(
            *(c.tolist() for c in (pieces.file[heads], pieces.file_offset[heads], arena_offset[heads], lengths)),
            strict=True,
        ):
            extents[file].append(Extent(file_offset=file_offset, arena_offset=place, length_bytes=length))
    return tuple(
        FileShare(name=files[f].name, size_bytes=files[f].size_bytes, extents=tuple(extents[f]))
        for f in sorted(extents)
    )
