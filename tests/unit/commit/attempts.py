"""An attempt as the writers leave it, made by hand: a layout, its files on disk, and the ranks' receipts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from awscrt.checksums import crc64nvme

from stillframe.commit.plan import AttemptPlan, encode_plan, entries
from stillframe.commit.publish import Publication
from stillframe.names import receipt_name
from stillframe.receipts import encode_receipt
from stillframe.records import FileLayout, FileReceipt, InlineFile, Item, Layout, Receipt, WrittenExtent

STEP = 5
ATTEMPT = "0123456789abcdef.1"
INLINE_FILES = (
    InlineFile(name="config.json", content=b'{"model_type": "tiny"}\n'),
    InlineFile(name="empty.txt", content=b""),
    InlineFile(name="code/model.py", content=b"pass\n"),
)


@dataclass(frozen=True)
class Piece:
    """A run of bytes of a weights file, and the rank that writes it."""

    file: str
    offset: int
    length: int
    rank: int


@dataclass(frozen=True)
class Attempt:
    """`items` are the lengths of the header and the tensors of each weights file, in order.

    `rank_files` are those that each rank writes alone.
    """

    items: Mapping[str, Sequence[int]]
    world_size: int
    inline_files: Sequence[InlineFile] = INLINE_FILES
    step: int = STEP
    attempt: str = ATTEMPT
    salt: str = ""
    kind: str = "hf"
    overwrite: bool = False
    held_back: tuple[str, ...] = ("config.json",)
    rank_files: Sequence[InlineFile] = ()
    contents: dict[str, bytes] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, lengths in self.items.items():
            size = sum(lengths)
            blocks = (hashlib.sha256(f"{self.salt}{name}{i}".encode()).digest() for i in range(size // 32 + 1))
            self.contents[name] = b"".join(blocks)[:size]

    @property
    def layout(self) -> Layout:
        files = []
        for name, lengths in self.items.items():
            items, position = [], 0
            for index, length in enumerate(lengths):
                tensor = f"{name}/tensor-{index}" if index else ""
                items.append(Item(name=tensor, file_offset=position, length_bytes=length))
                position += length
            files.append(FileLayout(name=name, size_bytes=position, items=tuple(items)))
        return Layout(
            format=self.kind,
            world_size=self.world_size,
            files=tuple(files),
            inline_files=(),
            total_bytes=sum(file.size_bytes for file in files),
            digest="a" * 64,
            rank_files=tuple(file.name for file in self.rank_files),
            held_back=self.held_back,
        )

    @property
    def plan(self) -> AttemptPlan:
        return AttemptPlan(
            kind=self.kind,
            step=self.step,
            attempt=self.attempt,
            overwrite=self.overwrite,
            layout=self.layout,
            versions={"torch": "2.13.0"},
            branch="main",
            metrics={"loss": 0.5},
        )

    def publication(self, run_dir: Path) -> Publication:
        return Publication(run_dir, self.plan)

    @property
    def rank_0_files(self) -> tuple[InlineFile, ...]:
        """What rank 0 saves beside its share of the layout's files."""
        return (*self.inline_files, *self.rank_files[:1])

    def small_files(self, rank: int) -> tuple[InlineFile, ...]:
        """What the rank's writer is given to write whole, under the names that it has until the publication."""
        if rank:
            return tuple(self.rank_files[rank : rank + 1])
        plan = replace(self.plan, inline_files=entries(self.rank_0_files))
        staged = (
            replace(file, name=f".stillframe/{file.name}") if file.name in self.held_back else file
            for file in self.rank_0_files
        )
        return (*staged, InlineFile(name=".stillframe/plan.json", content=encode_plan(plan)))

    def write(self, directory: Path) -> None:
        """Put every file but the receipts where the writers would have put it."""
        small = [file for rank in range(self.world_size) for file in self.small_files(rank)]
        for name, content in [*self.contents.items(), *((file.name, file.content) for file in small)]:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)

    def leave_receipts(self, directory: Path, pieces: Sequence[Piece] | None = None) -> None:
        """Put the ranks' receipts where the writers would have put them."""
        for receipt in self.receipts(self.item_pieces() if pieces is None else pieces):
            (directory / receipt_name(receipt.rank)).write_bytes(encode_receipt(receipt))

    def receipts(self, pieces: Sequence[Piece]) -> list[Receipt]:
        """What the ranks would say if each wrote its `pieces`, and rank 0 the inline files; by rank."""
        return [
            self._receipt(rank, [piece for piece in pieces if piece.rank == rank]) for rank in range(self.world_size)
        ]

    def _receipt(self, rank: int, pieces: Sequence[Piece]) -> Receipt:
        inline = [self._inline_receipt(file) for file in self.small_files(rank)]
        files = [self._file_receipt(name, [p for p in pieces if p.file == name]) for name in self.items]
        return Receipt(
            kind=self.kind,
            step=self.step,
            attempt=self.attempt,
            rank=rank,
            world_size=self.world_size,
            layout_digest="a" * 64,
            bytes_written=sum(piece.length for piece in pieces),
            files=tuple(receipt for receipt in (*inline, *files) if receipt.extents),
        )

    def _file_receipt(self, name: str, pieces: Sequence[Piece]) -> FileReceipt:
        content = self.contents[name]
        extents = (
            WrittenExtent(
                file_offset=piece.offset,
                length_bytes=piece.length,
                crc64nvme=crc64nvme(content[max(piece.offset, 0) : piece.offset + piece.length]),
            )
            for piece in sorted(pieces, key=lambda piece: piece.offset)
        )
        return FileReceipt(name=name, size_bytes=len(content), extents=tuple(extents))

    def _inline_receipt(self, file: InlineFile) -> FileReceipt:
        size = len(file.content)
        whole = WrittenExtent(file_offset=0, length_bytes=size, crc64nvme=crc64nvme(file.content))
        return FileReceipt(name=file.name, size_bytes=size, extents=(whole,))

    def item_pieces(self) -> list[Piece]:
        """The simplest tiling: each item whole, dealt to the ranks in turn."""
        pieces = []
        for name, lengths in self.items.items():
            position = 0
            for length in lengths:
                if length:
                    pieces.append(Piece(name, position, length, len(pieces) % self.world_size))
                position += length
        return pieces


def publish(publication: Publication, receipts: Sequence[Receipt], *, sequence: int = 1) -> None:
    publication.publish(publication.prove(receipts), sequence=sequence)
