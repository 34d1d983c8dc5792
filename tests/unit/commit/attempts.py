"""An attempt as the writers leave it, made by hand: a layout, its files on disk, and the ranks' receipts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from awscrt.checksums import crc64nvme

from stillframe.commit.publish import Publication
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
    """`items` are the lengths of the header and the tensors of each weights file, in order."""

    items: Mapping[str, Sequence[int]]
    world_size: int
    inline_files: Sequence[InlineFile] = INLINE_FILES
    step: int = STEP
    attempt: str = ATTEMPT
    salt: str = ""
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
            format="hf",
            world_size=self.world_size,
            files=tuple(files),
            inline_files=(),
            total_bytes=sum(file.size_bytes for file in files),
            digest="a" * 64,
            held_back=("config.json",),
        )

    def publication(self, run_dir: Path, *, overwrite: bool = False) -> Publication:
        return Publication(run_dir, self.layout, kind="hf", step=self.step, attempt=self.attempt, overwrite=overwrite)

    @property
    def staged_files(self) -> tuple[InlineFile, ...]:
        """The small files under the names that they have until the publication."""
        staged = {"config.json": ".stillframe/config.json"}
        return tuple(replace(file, name=staged.get(file.name, file.name)) for file in self.inline_files)

    def write(self, directory: Path) -> None:
        """Put every file where the writers would have put it."""
        for name, content in self.contents.items():
            (directory / name).write_bytes(content)
        for file in self.staged_files:
            (directory / file.name).parent.mkdir(exist_ok=True)
            (directory / file.name).write_bytes(file.content)

    def receipts(self, pieces: Sequence[Piece]) -> list[Receipt]:
        """What the ranks would say if each wrote its `pieces`, and rank 0 the inline files; by rank."""
        return [
            self._receipt(rank, [piece for piece in pieces if piece.rank == rank]) for rank in range(self.world_size)
        ]

    def _receipt(self, rank: int, pieces: Sequence[Piece]) -> Receipt:
        inline = [self._inline_receipt(file) for file in self.staged_files] if rank == 0 else []
        files = [self._file_receipt(name, [p for p in pieces if p.file == name]) for name in self.items]
        return Receipt(
            kind="hf",
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
    publication.publish(receipts, sequence=sequence, git_commit=None, versions={"torch": "2.13.0"})
