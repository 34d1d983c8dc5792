"""What several ranks hold alike, and which of them reads what of it, in buckets, that the others get from it.

Worked out by each rank for itself, from what it holds and the files' headers, and compared before anything is read.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from stillframe.commit.failure import in_words
from stillframe.errors import LoadError, StillframeError
from stillframe.layout.gather import BUCKET_BYTES
from stillframe.layout.runs import Runs
from stillframe.load.computing import Filler
from stillframe.load.directory import WeightFile
from stillframe.load.local import local_part
from stillframe.load.matching import Target
from stillframe.load.stages import tell_all

_LEAST_BUCKET_BYTES = 64 << 10  # smaller ones would cost more in latency than a rank saves in reading
_ALIGN_BYTES = 16  # no element is larger


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`count` elements from element `first` on of the local part of a target, at byte `begin` of a bucket.

    `part`: the target's number in `Alike.parts`.
    """

    part: int
    first: int
    count: int
    begin: int
    dtype: torch.dtype

    def of(self, content: torch.Tensor) -> torch.Tensor:
        """Its elements in the content of the bucket, bytes, as a view."""
        return content[self.begin : self.begin + self.count * self.dtype.itemsize].view(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What `reader`, a global rank, reads at once and the others get from it."""

    reader: int
    size_bytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alike:
    """What each of `replicas` (global ranks, ascending) holds alike: `parts`, targets with the runs of the local part.

    `buckets`, in the order in which they travel, tile the parts, each from its first element to its last.
    """

    replicas: tuple[int, ...]
    parts: tuple[tuple[Target, Runs], ...]
    buckets: tuple[Bucket, ...]

    def read_by(self, rank: int) -> list[Runs]:
        """The runs of all parts of which `rank` reads anything."""
        numbers = {piece.part for bucket in self.buckets if bucket.reader == rank for piece in bucket.pieces}
        return [self.parts[number][1] for number in sorted(numbers)]

    def digest(self) -> str:
        """The same on ranks that will exchange the same."""
        parts = [(target.name, str(target.tensor.dtype), local_part(target.tensor).shape) for target, _ in self.parts]
        buckets = [(b.reader, b.size_bytes, [(p.part, p.first, p.count) for p in b.pieces]) for b in self.buckets]
        return hashlib.sha256(repr((parts, buckets)).encode()).hexdigest()


def share_out(
    replicas: tuple[int, ...],
    parts: Sequence[tuple[Target, Runs]],
    filler: Filler,
    *,
    bucket_bytes: int | None = None,
) -> Alike:
    """Decide who reads what of `parts`, evenly. What one conversion computes one rank computes; that comes first."""
    bucket_bytes = BUCKET_BYTES if bucket_bytes is None else bucket_bytes
    computed: dict[int, list[int]] = {}
    stored = []
    for number, (_, runs) in enumerate(parts):
        conversion = filler.conversion(runs)
        if conversion is None:
            stored.append(number)
        else:
            computed.setdefault(id(conversion), []).append(number)
    contents = [list(_cut(parts, numbers, bucket_bytes)) for numbers in computed.values()]
    even_bytes = _even_bytes(sum(local_part(parts[n][0].tensor).nbytes for n in stored), len(replicas), bucket_bytes)
    contents += [[pieces] for pieces in _cut(parts, stored, even_bytes)]
    loads = [(0, rank) for rank in replicas]
    buckets = []
    for content in contents:
        load, reader = loads[0]
        own = [Bucket(reader=reader, size_bytes=_size_bytes(pieces), pieces=tuple(pieces)) for pieces in content]
        heapq.heapreplace(loads, (load + sum(bucket.size_bytes for bucket in own), reader))
        buckets += own
    return Alike(replicas=replicas, parts=tuple(parts), buckets=tuple(buckets))


def _even_bytes(total_bytes: int, readers: int, most_bytes: int) -> int:
    """The size of buckets of which each reader gets the same number."""
    rounds = max(1, -(-total_bytes // (readers * most_bytes)))
    even_bytes = -(-total_bytes // (readers * rounds))
    return min(most_bytes, max(_LEAST_BUCKET_BYTES, _aligned(even_bytes)))


def _size_bytes(pieces: Sequence[Piece]) -> int:
    return pieces[-1].begin + pieces[-1].count * pieces[-1].dtype.itemsize


def _aligned(count: int) -> int:
    return -(-count // _ALIGN_BYTES) * _ALIGN_BYTES


def _cut(parts: Sequence[tuple[Target, Runs]], numbers: Sequence[int], size_bytes: int) -> Iterator[list[Piece]]:
    """Pieces of the parts of these numbers, in order, by buckets of at most so many bytes."""
    pieces: list[Piece] = []
    begin = 0
    for number in numbers:
        local = local_part(parts[number][0].tensor)
        first = 0
        while first < local.numel():
            count = min(local.numel() - first, (size_bytes - begin) // local.dtype.itemsize)
            if count > 0:
                pieces.append(Piece(part=number, first=first, count=count, begin=begin, dtype=local.dtype))
                first += count
                begin = _aligned(begin + count * local.dtype.itemsize)
            if begin + local.dtype.itemsize > size_bytes:
                yield pieces
                pieces, begin = [], 0
    if pieces:
        yield pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class AllRanks:
    """All ranks of the job, which load `directory` together; `timeout_s` bounds each wait for them.

    They tell each other how it goes, twice: when each has checked what it will load, and when each has loaded it.
    """

    directory: Path
    timeout_s: float

    def agree(self, alike: Sequence[Alike], files: Sequence[WeightFile]) -> bool:
        """Whether any ranks hold anything alike.

        Every rank calls this, or `fail`; blocks until all have. Raises on all what one has failed with, or LoadError
        where ranks that hold the same are about to load something else, or did not come in time."""
        published = sorted((name, crc) for file in files for name, crc in (file.checksums or {}).items())
        content = hashlib.sha256(repr(published).encode()).hexdigest()
        own = {_name(one.replicas): [one.digest() + content, len(one.replicas)] for one in alike}
        told = self._tell(json.dumps(own))
        having: dict[str, dict[str, list[int]]] = {}
        expected: dict[str, int] = {}
        for text, ranks in zip(told, told.values(), strict=True):
            for name, (digest, count) in json.loads(text).items():
                having.setdefault(name, {}).setdefault(digest, []).extend(ranks)
                expected[name] = count
        for name, by_digest in sorted(having.items()):
            if len(by_digest) > 1 or sum(map(len, by_digest.values())) != expected[name]:
                groups = "; ".join(in_words(sorted(ranks)) for ranks in by_digest.values())
                raise LoadError(
                    f"{self.directory}: of {expected[name]} ranks that hold the same tensors not all are about to load "
                    f"the same ({groups}): their models differ, or their files. Give all ranks the same model and "
                    "directory, or copies of it, or load without broadcast"
                )
        return bool(expected)

    def finish(self) -> None:
        """Every rank calls this, or `fail`, once it has loaded what it holds. Raises like `agree`."""
        self._tell("")

    def fail(self, error: Exception) -> None:
        """Tell the others what keeps this rank from loading, in place of `agree` or `finish`."""
        with suppress(StillframeError):  # the caller raises its own
            self._tell(error)

    def _tell(self, text: str | Exception) -> Mapping[str, tuple[int, ...]]:
        told = tell_all(text, what="broadcasting-loads", directory=self.directory, timeout_s=self.timeout_s)
        return dict(zip(told.texts, told.ranks, strict=True))


def _name(replicas: tuple[int, ...]) -> str:
    return hashlib.sha256(repr(replicas).encode()).hexdigest()
