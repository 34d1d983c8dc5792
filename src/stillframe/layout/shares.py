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
from stillframe.records import Copy, Envelope, Extent, FileLayout, FileShare, Layout, RankShare, WritePlan

_PAGE_BYTES = 4096
_LINE_BYTES = 64
_PAGE_ALIGN_FROM_BYTES = 1 << 19  # from here on the writer uses direct I/O


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedItem:
    """An item of a file and what it consists of: an envelope's `content`, or `runs` of elements of tensors.

    `element_bytes` is the size of an element in the file; `cast_to` torch's name of its dtype there, None where it is
    the tensors' own.
    """

    file: int
    file_offset: int
    length_bytes: int
    content: bytes = b""
    runs: Runs | None = None
    element_bytes: int = 1
    cast_to: str | None = None


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
) -> RankShare:
    """The share of `rank` in `layout`. `items` are those of `layout.files`, in order; `Runs.source` indexes `sources`.

    Envelopes go round robin over the ranks. Raises CoverageError if items do not tile their files.
    """
    prove_coverage(layout.files, items)
    element_bytes = np.array([item.element_bytes for item in items], dtype=np.int64)
    held = _held(items, sources, holdings)
    mine = [_envelopes(items, [i for i, item in enumerate(items) if item.file % layout.world_size == rank])]
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
    prove_coverage(files, items)
    pieces = _runs_of(items)
    element_bytes = np.array([item.element_bytes for item in items], dtype=np.int64)
    held = replace(pieces, length=pieces.length * element_bytes[pieces.item])
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
    copies, envelopes = [], []
    for place, length, item, source, element in zip(
        *(c.tolist() for c in (arena_offset, pieces.length, pieces.item, pieces.source, pieces.element)),
        strict=True,
    ):
        if source < 0:
            envelopes.append(Envelope(arena_offset=place, content=items[item].content))
        else:
            copies.append(
                Copy(
                    tensor=sources[source],
                    first_element=element,
                    element_count=length // items[item].element_bytes,
                    arena_offset=place,
                    dtype=items[item].cast_to,
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


def prove_coverage(files: Sequence[FileLayout], items: Sequence[PlacedItem]) -> None:
    """Raise CoverageError unless the items tile every file from its first byte to its last."""
    ends = [0] * len(files)
    for item in items:
        file = files[item.file]
        if item.file_offset != ends[item.file]:
            raise CoverageError(f"{file.name}: bytes {ends[item.file]} to {item.file_offset} are covered wrongly")
        ends[item.file] += item.length_bytes
        if item.runs is None:
            tiled = len(item.content) == item.length_bytes
        else:
            tiled = item.runs.covers(item.length_bytes // item.element_bytes)
        if not tiled:
            raise CoverageError(f"{file.name}: the item at offset {item.file_offset} is not covered by its parts")
    for file, end in zip(files, ends, strict=True):
        if end != file.size_bytes:
            raise CoverageError(f"{file.name}: has {file.size_bytes} bytes, of which {end} are covered")


def _envelopes(items: Sequence[PlacedItem], index: Sequence[int]) -> Pieces:
    """Those of the items of these numbers that are envelopes, each whole."""
    rows = [
        (items[i].file, items[i].file_offset, items[i].length_bytes, i, -1, 0) for i in index if items[i].runs is None
    ]
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    return Pieces(*(table[:, c] for c in range(6)))


def _runs_of(items: Sequence[PlacedItem]) -> Pieces:
    """The runs of all items; lengths in elements, not in bytes."""
    columns: list[list[Ints]] = [[np.zeros(0, dtype=np.int64)] for _ in range(6)]
    for i, item in enumerate(items):
        if item.runs is None or not len(item.runs):
            continue
        n, runs, size = len(item.runs), item.runs, item.element_bytes
        of_item = (
            np.full(n, item.file),
            item.file_offset + runs.start * size,
            runs.length,
            np.full(n, i),
            runs.source,
            runs.source_start,
        )
        for column, values in zip(columns, of_item, strict=True):
            column.append(values)
    return Pieces(*(np.concatenate(c) for c in columns))


def _held(
    items: Sequence[PlacedItem], sources: Sequence[str], holdings: Mapping[str, Holding]
) -> dict[tuple[int, ...], Pieces]:
    """The runs of all items that this rank holds, by the ranks that hold the same."""
    pieces = _runs_of(items)
    element_bytes = np.array([item.element_bytes for item in items], dtype=np.int64)
    pieces = pieces.take(np.argsort(pieces.source, kind="stable"))
    borders = np.searchsorted(pieces.source, np.arange(len(sources) + 1))
    held: dict[tuple[int, ...], list[Pieces]] = defaultdict(list)
    for s, name in enumerate(sources):
        low, high = int(borders[s]), int(borders[s + 1])
        holding = holdings[name]
        if low == high or not len(holding.runs):
            continue
        wanted = pieces.take(np.arange(low, high))
        runs = holding.runs
        a, b, start, count = overlap(wanted.element, wanted.length, runs.start, runs.length)
        part = wanted.take(a)
        size_of = element_bytes[part.item]
        file_offset = part.file_offset + (start - part.element) * size_of
        local = runs.source_start[b] + (start - runs.start[b])
        held[holding.replicas].append(Pieces(part.file, file_offset, count * size_of, part.item, part.source, local))
    return {replicas: Pieces.concatenate(parts) for replicas, parts in held.items()}


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
