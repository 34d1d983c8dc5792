"""Cut a rank's extents of one file into the blocks that are written at once. Pure: no I/O.

Extents that follow each other in the file are written as one run, whatever tensors they belong to. Of a large run, the
whole pages inside can go to the disk without the page cache (O_DIRECT); the part of a page at either end cannot, and
must not: the rest of that page may belong to another rank. Mostly a run lies in the arena as it does in the file, and
is written from there; where it does not, as of an export that was staged together with a checkpoint, its blocks are
gathered first. CRCs are kept per extent, so each block says where the borders of extents lie inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stillframe.records import FileShare

# Direct I/O wants file offset, length and memory aligned to the device's logical block, at most a page in practice.
DIRECT_ALIGNMENT_BYTES = 4096
# Below this, a direct write's fixed cost (a device round trip that nothing hides) outweighs the copy that it saves. The
# break-even was measured at 300 to 700 KiB; above it the page cache only adds memory and a slow, uneven writeback.
DIRECT_MIN_BYTES = 512 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a block that belongs to one extent, by the extent's index in its `FileShare`, and where it is."""

    extent_index: int
    arena_offset: int
    length_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Bytes written with one call: contiguous in the file, and tiled by `pieces` in order.

    `arena_offset` is None where they do not lie in the arena so that they can be written from there, and are gathered.
    """

    file_offset: int
    arena_offset: int | None
    length_bytes: int
    direct: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileBlocks:
    """A rank's share of one file, cut into blocks; made once per plan and used in every save of it."""

    share: FileShare
    blocks: tuple[Block, ...]


def cut_blocks(share: FileShare, *, arena_bytes: int, block_bytes: int) -> FileBlocks:
    """Cut the extents of `share` into blocks of at most `block_bytes`, in file order.

    Raises ValueError, naming the file, if its extents are unsorted, overlap, or leave the file or the arena.
    """
    _check_extents(share, arena_bytes)
    blocks: list[Block] = []
    for first, end in _runs(share):
        blocks.extend(_cut_run(share, first, end, block_bytes))
    return FileBlocks(share=share, blocks=tuple(blocks))


def _check_extents(share: FileShare, arena_bytes: int) -> None:
    previous_end = 0
    for extent in share.extents:
        if extent.length_bytes < 0 or extent.file_offset < previous_end:
            raise ValueError(f"extents of {share.name!r} overlap or are unsorted at offset {extent.file_offset}")
        previous_end = extent.file_offset + extent.length_bytes
        if previous_end > share.size_bytes:
            raise ValueError(f"an extent of {share.name!r} ends at {previous_end}, past its {share.size_bytes} bytes")
        if extent.arena_offset < 0 or extent.arena_offset + extent.length_bytes > arena_bytes:
            raise ValueError(
                f"the extent at offset {extent.file_offset} of {share.name!r} lies outside the arena: "
                f"arena offset {extent.arena_offset}, {extent.length_bytes} of {arena_bytes} bytes"
            )


def _runs(share: FileShare) -> Iterator[tuple[int, int]]:
    """Index ranges [first, end) of extents that follow each other in the file."""
    extents = share.extents
    first = 0
    for index in range(1, len(extents) + 1):
        if index < len(extents):
            left, right = extents[index - 1], extents[index]
            if left.file_offset + left.length_bytes == right.file_offset:
                continue
        if extents:
            yield first, index
        first = index


def _cut_run(share: FileShare, first: int, end: int, block_bytes: int) -> Iterator[Block]:
    start = share.extents[first].file_offset
    stop = share.extents[end - 1].file_offset + share.extents[end - 1].length_bytes
    inner_start = -(-start // DIRECT_ALIGNMENT_BYTES) * DIRECT_ALIGNMENT_BYTES
    inner_stop = stop // DIRECT_ALIGNMENT_BYTES * DIRECT_ALIGNMENT_BYTES
    if inner_stop - inner_start < DIRECT_MIN_BYTES:
        inner_start = inner_stop = stop
    extent_index = first
    position = start
    while position < stop:
        direct = inner_start <= position < inner_stop
        limit = inner_stop if direct else inner_start if position < inner_start else stop
        block_stop = limit
        if limit - position > block_bytes:
            # Cutting at multiples of the block size keeps blocks inside the stripes of RAID and parallel file systems.
            block_stop = (position // block_bytes + 1) * block_bytes
        pieces, extent_index = _cut_pieces(share, extent_index, position, block_stop)
        yield Block(
            file_offset=position,
            arena_offset=_place(pieces, direct=direct),
            length_bytes=block_stop - position,
            direct=direct,
            pieces=pieces,
        )
        position = block_stop


def _place(pieces: tuple[Piece, ...], *, direct: bool) -> int | None:
    """Where `pieces` lie in the arena one after the other (for direct writes: from a page's border on); else None."""
    start = end = pieces[0].arena_offset
    for piece in pieces:
        if piece.arena_offset != end:
            return None
        end += piece.length_bytes
    return None if direct and start % DIRECT_ALIGNMENT_BYTES else start


def _cut_pieces(share: FileShare, extent_index: int, start: int, stop: int) -> tuple[tuple[Piece, ...], int]:
    """The pieces of the bytes [start, stop) of the file, and the index of the extent that the next byte is in."""
    pieces: list[Piece] = []
    while start < stop:
        extent = share.extents[extent_index]
        extent_stop = extent.file_offset + extent.length_bytes
        length_bytes = min(extent_stop, stop) - start
        if length_bytes:
            arena_offset = extent.arena_offset + start - extent.file_offset
            pieces.append(Piece(extent_index=extent_index, arena_offset=arena_offset, length_bytes=length_bytes))
            start += length_bytes
        if start == extent_stop:
            extent_index += 1
    return tuple(pieces), extent_index
