"""The frozen records that stages hand each other. Torch-free, so the writer process can import them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from stillframe.sketch import Sketch


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """One contiguous run of bytes of one file, which this rank owns and keeps contiguous in its arena too."""

    file_offset: int
    arena_offset: int
    length_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One named part of a file: the envelope (`name` is "") or a tensor. Items tile their file without gaps."""

    name: str
    file_offset: int
    length_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """One file of a checkpoint as all ranks know it: its size and the items that tile it, by offset."""

    name: str
    size_bytes: int
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileShare:
    """This rank's part of one file: extents by file offset. No extent crosses the border of an item."""

    name: str
    size_bytes: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WritePlan:
    """What this rank's writer does in every save of one layout; sent to it once and then named by `plan_id`."""

    plan_id: int
    rank: int
    world_size: int
    layout_digest: str
    arena_bytes: int
    files: tuple[FileShare, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A contiguous run of elements of this rank's local part of a tensor, and where the snapshot puts it in the arena.

    `first_element` counts in the local tensor, flat and row-major; `arena_offset` in bytes. `dtype` is torch's name of
    what the elements become in the copy ("bfloat16"), None where they stay as they are. With `dims` the elements are
    those of the local tensor with its dimensions in that order, in the row-major order of that.
    """

    tensor: str
    first_element: int
    element_count: int
    arena_offset: int
    dtype: str | None
    dims: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedCopy(Copy):
    """A copy of elements of a matrix that is saved in fp8, each multiplied by the scale of its block.

    `matrix` is the key, `position` the place of the first element in it, flat and row-major.
    """

    matrix: str
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalesCopy(Copy):
    """Scales of the blocks of `matrix`, from number `position` on, flat and row-major; they are worked out in the copy.

    Who writes them is who holds elements of those blocks: `tensor` and `first_element` say where.
    """

    matrix: str
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """A rectangle of a matrix, and where its rows lie in the local part of `tensor` and in some other place.

    Row i of it begins at element `element + i * element_step` of the flat tensor, and at `place + i * place_step`.
    """

    tensor: str
    row: int
    rows: int
    column: int
    columns: int
    element: int
    element_step: int
    place: int
    place_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix that is saved in fp8: what of it this rank holds (`patches`), and which rows of blocks ranks share.

    `shared`: `(first row of blocks, how many, place of their first block in the table)`. The table has the blocks that
    no rank may hold alone, of all matrices; all ranks number it alike.
    """

    rows: int
    columns: int
    patches: tuple[Patch, ...]
    shared: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The matrices, by key, of which this rank holds anything, and the length of the table of shared blocks."""

    matrices: Mapping[str, Matrix]
    shared_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A box of a tensor that the rank `sender` has, for another: where it begins in the whole tensor and in the part
    that the sender holds, and its size along each dimension."""

    tensor: str
    sender: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local_offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """Tensors that come to one rank, their `owner`, while they are staged; there each is whole for a moment.

    On the owner `pieces` are what it gets and what it has itself, in the order in which they come; on another rank what
    that one sends. `tensors` are those that come together so; `computed` names what a conversion makes of them there,
    which is copied like a tensor of that name. Both are empty on other ranks.
    """

    owner: int
    pieces: tuple[Piece, ...]
    tensors: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The keys whose bytes came to one rank before they were written, and how much of them travels at once."""

    keys: tuple[str, ...]
    bucket_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """Bytes known from the layout alone (a safetensors header), put into the arena once."""

    arena_offset: int
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshuffle:
    """A tensor that some ranks exchange among themselves while they stage it, so that each has whole rows of it.

    Each of `members` (global ranks, by their coordinate along dimension `mesh_dim` of the tensor's mesh) holds the same
    `row_count` rows, and of each row the columns in `columns`: `(first, count)`, in the order of its local tensor, in
    units of `column_elements` elements. Member j becomes the owner of the rows `owned(j)`. They travel in buckets, in
    each at most `bucket_rows` rows of every owner. `copies` says for each bucket what of it this rank stages; their
    `first_element` counts in the bucket's own rows, flat and whole.
    """

    tensor: str
    mesh_dim: int
    members: tuple[int, ...]
    row_count: int
    column_elements: int
    columns: tuple[tuple[tuple[int, int], ...], ...]
    bucket_rows: int
    copies: tuple[tuple[Copy, ...], ...] = ()

    def row_elements(self, member: int) -> int:
        """How many elements of each row `member` holds."""
        return sum(count for _, count in self.columns[member]) * self.column_elements

    @property
    def whole_row_elements(self) -> int:
        return sum(self.row_elements(member) for member in range(len(self.members)))

    def owned(self, member: int) -> range:
        """The rows that `member` has after the exchange."""
        count = len(self.members)
        return range(self.row_count * member // count, self.row_count * (member + 1) // count)

    @property
    def bucket_count(self) -> int:
        """The same for all members: some have nothing in the last bucket."""
        largest = max(len(self.owned(member)) for member in range(len(self.members)))
        return -(-largest // self.bucket_rows)

    def in_bucket(self, member: int, bucket: int) -> range:
        """The rows of `member` that are in bucket number `bucket`."""
        return self.owned(member)[bucket * self.bucket_rows : (bucket + 1) * self.bucket_rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """Everything that one rank contributes to a layout: what its writer writes, and how its arena is filled.

    `copies` are of the rank's own parts of tensors; those of `reshuffles` come to it in an exchange with other ranks,
    which all do in this order.
    """

    plan: WritePlan
    copies: tuple[Copy, ...]
    envelopes: tuple[Envelope, ...]
    reshuffles: tuple[Reshuffle, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineFile:
    """A small file whose whole content travels with the request (config, tokenizer, index)."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshuffled:
    """That tensors were exchanged among ranks on their way into the files: how many, their bytes in the model, and how
    many bytes at most a rank takes in at once (rows of tensors that are longer come one by one)."""

    tensors: int
    size_bytes: int
    bucket_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One checkpoint's files as every rank computes them. Equal `digest`s mean equal layouts and equal distribution.

    `format`: "hf", "checkpoint" (DCP) or "step" (both, in subdirectories). `inline_files` follow from the layout (the
    index); `files` hold the tensors, in a checkpoint on rank 0 those of all ranks, elsewhere its own. `total_bytes`
    counts `files` only. Of `rank_files`, rank r writes number r whole, of a size that only it knows. `held_back` names
    the inline files without which nobody loads the directory; they are put in place last. `reshuffled` and `gathered`
    are None where every rank writes what it holds. `sketch` tells layouts with different digests apart by tensor; it is
    not on disk.
    """

    format: str
    world_size: int
    files: tuple[FileLayout, ...]
    inline_files: tuple[InlineFile, ...]
    total_bytes: int
    digest: str
    rank_files: tuple[str, ...] = ()
    held_back: tuple[str, ...] = ()
    gathered: Gathered | None = None
    reshuffled: Reshuffled | None = None
    sketch: Sketch | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRequest:
    """One save, for one rank's writer.

    `directory` is the hidden directory. The writer opens it once, checks that `marker_name` exists in it (so that it
    never writes into the directory of another attempt that took the same name), and reaches every file through
    that descriptor. Its receipt goes to `receipt_name`. Both names are relative to the directory.
    """

    plan_id: int
    kind: str
    step: int
    attempt: str
    directory: Path
    marker_name: str
    receipt_name: str
    inline_files: tuple[InlineFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenExtent:
    """An extent that is on disk, with the CRC64-NVME of its bytes as they were handed to the kernel."""

    file_offset: int
    length_bytes: int
    crc64nvme: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReceipt:
    """What one rank wrote and fsynced of one file; `extents` by file offset."""

    name: str
    size_bytes: int
    extents: tuple[WrittenExtent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One rank's statement that its share of one attempt is written and fsynced, every byte of it.

    An inline file appears as a `FileReceipt` with one extent that covers it.
    """

    kind: str
    step: int
    attempt: str
    rank: int
    world_size: int
    layout_digest: str
    bytes_written: int
    files: tuple[FileReceipt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What the start of a job did with a directory that an earlier one had left unpublished.

    `path` is where it was. `action` is "published" (it has its final name now), "removed", or "left" (it stays, since
    it is not recognised, or something is in the way); `reason` says why.
    """

    path: Path
    kind: str
    step: int
    action: Literal["published", "removed", "left"]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A published checkpoint, as its manifest has it.

    Entries order by `sequence`, the order of publication, not by step. `kind` is that of the name: "hf", "checkpoint",
    "snapshot" or "step". `branch` is the branch of the run that published it, "" the first.
    `metrics` are those that were given at the save and are finite.
    """

    path: Path
    kind: str
    step: int
    sequence: int
    world_size: int
    size_bytes: int
    published_at: str
    branch: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def published_time(self) -> datetime | None:
        """`published_at` in UTC; None where the manifest has something there that is no time."""
        return time_of(self.published_at)


def time_of(published_at: str) -> datetime | None:
    """A manifest's `published_at` in UTC; None for something that is no time."""
    try:
        time = datetime.fromisoformat(published_at)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
