"""Chunks of a DCP directory -> this rank's elements of tensors that are distributed in some other way.

A chunk is a box of the whole tensor, what the rank holds is runs of it; where both overlap is worked out chunk by chunk
with arrays. Files are read front to back. Chunks that are large go straight into place where they can, or
through a buffer block by block; small ones that lie close together are read with one call. Everything is moved as
bytes, so no dtype is ever converted.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from awscrt.checksums import crc64nvme

from stillframe.errors import CorruptCheckpoint
from stillframe.layout.placement import Holding
from stillframe.layout.runs import Runs, coalesce, overlap, strided
from stillframe.load.blob import Payload, find_payload, open_blob
from stillframe.load.local import local_part, own_holdings
from stillframe.load.metadata import StoredChunk, StoredState, chunk_name
from stillframe.load.reading import read_into
from stillframe.manifest import TensorEntry

Opener = Callable[[str], tuple[Path, int]]
"""Path and descriptor of a file of the directory, by its name there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes in bytes by which it is decided how chunks are read.

    `buffer_bytes`: what is read at once into memory of our own. `small_bytes`, not more than that: up to here a chunk
    (with its envelope, where that must be read) is read together with others, between which `gap_bytes` may lie.
    `long_piece_bytes`: from here on pieces are worth a place of their own in a read, or a copy of their own.
    """

    buffer_bytes: int = 4 << 20
    small_bytes: int = 256 << 10
    gap_bytes: int = 64 << 10
    long_piece_bytes: int = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A chunk that this rank needs something of.

    `memory`: the target's local part as bytes, one dimension. `pieces`: from elements of the chunk (`source_start`,
    ascending) to elements of the target (`start`). `begin`, `length_bytes`: what is read of the file, the chunk's
    payload or, where only its envelope says where that is, its blob.
    """

    key: str
    chunk: StoredChunk
    dtype: torch.dtype
    memory: torch.Tensor
    pieces: Runs
    entry: TensorEntry | None
    begin: int
    length_bytes: int

    @property
    def is_whole(self) -> bool:
        return int(self.pieces.length.sum()) == self.chunk.elements

    @property
    def mean_piece_bytes(self) -> int:
        return int(self.pieces.length.mean()) * self.dtype.itemsize


def fill_targets(
    targets: Mapping[str, torch.Tensor],
    stored: Mapping[str, StoredState],
    entries: Mapping[str, TensorEntry] | None,
    opener: Opener,
    *,
    verify: bool,
    limits: Limits,
) -> int:
    """Fill what this rank holds of `targets` from the chunks in `stored`, which have their shapes and dtypes.

    `entries`: the chunks' payloads by name, from a manifest; without them they are found through the envelopes.
    Returns the bytes read. Raises UnsupportedPlacement before anything is written, CorruptCheckpoint or LoadError.
    """
    return _Filling(entries, opener, limits, verify=verify).fill(targets, stored)


class _Filling:
    def __init__(
        self, entries: Mapping[str, TensorEntry] | None, opener: Opener, limits: Limits, *, verify: bool
    ) -> None:
        self._entries = entries
        self._opener = opener
        self._limits = limits
        self._verify = verify
        self._buffer = torch.empty(limits.buffer_bytes, dtype=torch.uint8, device="cpu")
        self._bytes_read = 0

    @torch.no_grad()
    def fill(self, targets: Mapping[str, torch.Tensor], stored: Mapping[str, StoredState]) -> int:
        holdings = own_holdings()
        # A plain tensor is held by every rank, so each must get its values, as of a parameter.
        held = {key: holdings.of(key, target, is_parameter=True) for key, target in targets.items()}
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        needed: list[tuple[str, int, int, str, StoredChunk, torch.Tensor]] = []
        for key, target in targets.items():
            local = local_part(target).detach()
            if not local.numel():
                continue
            values = local
            if not local.is_contiguous() or local.is_conj() or local.is_neg():
                values = torch.empty(local.shape, dtype=local.dtype, device=local.device)
                copies.append((local, values))
            memory = values.view(-1).view(torch.uint8)
            for chunk in _candidates(stored[key], held[key]):
                begin, length = self._span(key, chunk)
                needed.append((chunk.blob.file, begin, length, key, chunk, memory))
        needed.sort(key=lambda need: need[:2])
        for batch in _batches(self._jobs(needed, stored, held), self._limits):
            if batch[0].length_bytes > self._limits.small_bytes:
                self._fill_large(batch[0])
            else:
                self._fill_small(batch)
        for local, values in copies:
            local.copy_(values)
        return self._bytes_read

    def _span(self, key: str, chunk: StoredChunk) -> tuple[int, int]:
        if self._entries is None:
            return chunk.blob.offset, chunk.blob.length_bytes
        entry = self._entries[chunk_name(key, chunk.offsets)]
        return entry.offset, entry.size

    def _jobs(
        self,
        needed: Sequence[tuple[str, int, int, str, StoredChunk, torch.Tensor]],
        stored: Mapping[str, StoredState],
        held: Mapping[str, Holding],
    ) -> Iterator[_Job]:
        for _, begin, length, key, chunk, memory in needed:
            pieces = _pieces(stored[key].shape, chunk, held[key])
            if len(pieces):
                yield _Job(
                    key=key,
                    chunk=chunk,
                    dtype=stored[key].dtype,
                    memory=memory,
                    pieces=pieces,
                    entry=self._entries[chunk_name(key, chunk.offsets)] if self._entries is not None else None,
                    begin=begin,
                    length_bytes=length,
                )

    def _fill_small(self, batch: Sequence[_Job]) -> None:
        begin, end = batch[0].begin, max(job.begin + job.length_bytes for job in batch)
        path, window = self._read(batch[0].chunk.blob.file, begin, end - begin)
        for job in batch:
            part = window[job.begin - begin : job.begin - begin + job.length_bytes]
            payload = _published(job)
            if payload is None:
                payload = _found(job, path, io.BytesIO(part.numpy().tobytes()))
                part = window[payload.file_offset - begin : payload.file_offset - begin + payload.length_bytes]
            self._check(job, path, crc64nvme(part.numpy().data) if self._checks(job) else None)
            _scatter(job, _row_major(job, payload, part), 0, self._limits)

    def _fill_large(self, job: _Job) -> None:
        path, descriptor = self._opener(job.chunk.blob.file)
        payload = _published(job) or _found(job, path, open_blob(path, descriptor, job.chunk.blob))
        if payload.stride is not None:
            raw = torch.empty(payload.length_bytes, dtype=torch.uint8, device="cpu")
            self._bytes_read += read_into(path, descriptor, payload.file_offset, [raw.numpy().data])
            values = _row_major(job, payload, raw)
            step = self._limits.buffer_bytes // job.dtype.itemsize * job.dtype.itemsize
            for low in range(0, len(values), step):
                _scatter(job, values[low : low + step], low // job.dtype.itemsize, self._limits)
        elif job.memory.device.type == "cpu" and self._long(job) and (job.is_whole or not self._checks(job)):
            self._read_straight(job, payload, path, descriptor)
        else:
            self._read_in_blocks(job, payload, path, descriptor)

    def _read_straight(self, job: _Job, payload: Payload, path: Path, descriptor: int) -> None:
        """The pieces of a chunk into their places; the checksum of a whole one over what is there then."""
        memory, size = job.memory.numpy().data, job.dtype.itemsize
        rows = zip(job.pieces.start.tolist(), job.pieces.source_start.tolist(), job.pieces.length.tolist(), strict=True)
        pieces = [(source, memory[start * size : (start + length) * size]) for start, source, length in rows]
        if job.is_whole:
            places = [place for _, place in pieces]
            self._bytes_read += read_into(path, descriptor, payload.file_offset, places)
            if self._checks(job):
                crc = 0
                for place in places:
                    crc = crc64nvme(place, crc)
                self._check(job, path, crc)
        else:
            for source, place in pieces:
                self._bytes_read += read_into(path, descriptor, payload.file_offset + source * size, [place])

    def _read_in_blocks(self, job: _Job, payload: Payload, path: Path, descriptor: int) -> None:
        """A chunk through the buffer, from its first needed element to its last; all of it for the checksum."""
        size, pieces = job.dtype.itemsize, job.pieces
        low, high = int(pieces.source_start[0]), int(pieces.source_start[-1] + pieces.length[-1])
        if self._checks(job):
            low, high = 0, job.chunk.elements
        crc, step = 0, self._limits.buffer_bytes // size
        for first in range(low, high, step):
            count = min(step, high - first)
            block = self._buffer[: count * size]
            self._bytes_read += read_into(path, descriptor, payload.file_offset + first * size, [block.numpy().data])
            if self._checks(job):
                crc = crc64nvme(block.numpy().data, crc)
            _scatter(job, block, first, self._limits)
        self._check(job, path, crc if self._checks(job) else None)

    def _read(self, file: str, begin: int, length: int) -> tuple[Path, torch.Tensor]:
        path, descriptor = self._opener(file)
        window = self._buffer[:length]
        self._bytes_read += read_into(path, descriptor, begin, [window.numpy().data])
        return path, window

    def _long(self, job: _Job) -> bool:
        return job.mean_piece_bytes >= self._limits.long_piece_bytes

    def _checks(self, job: _Job) -> bool:
        return self._verify and job.entry is not None

    def _check(self, job: _Job, path: Path, crc: int | None) -> None:
        if crc is None or job.entry is None or f"{crc:016x}" == job.entry.crc64nvme:
            return
        begin, end = job.entry.offset, job.entry.offset + job.entry.size
        raise CorruptCheckpoint(
            f"{path}: {job.key!r} (its chunk at {job.chunk.offsets}) was changed or damaged after it was published: "
            f"the checksum of bytes {begin} to {end} is {crc:016x}, not {job.entry.crc64nvme}. Load another checkpoint"
        )


def _published(job: _Job) -> Payload | None:
    if job.entry is None:
        return None
    return Payload(file_offset=job.entry.offset, length_bytes=job.entry.size)


def _found(job: _Job, path: Path, stream: io.BytesIO | io.BufferedReader) -> Payload:
    blob = job.chunk.blob
    where = (
        f"{path}: {job.key!r} (its chunk at {job.chunk.offsets}), bytes {blob.offset} to "
        f"{blob.offset + blob.length_bytes},"
    )
    return find_payload(blob, stream, dtype=job.dtype, shape=job.chunk.sizes, where=where)


def _candidates(stored: StoredState, held: Holding) -> Iterator[StoredChunk]:
    """The chunks that may hold something of what the rank holds: whose first and last elements enclose any of it."""
    if len(stored.chunks) == 1:
        yield stored.chunks[0]
        return
    low, high = int(held.runs.start[0]), int(held.runs.start[-1] + held.runs.length[-1])
    strides = _strides(stored.shape)
    for chunk in stored.chunks:
        first = sum(o * step for o, step in zip(chunk.offsets, strides, strict=True))
        last = first + sum((n - 1) * step for n, step in zip(chunk.sizes, strides, strict=True))
        if first < high and low <= last:
            yield chunk


def _pieces(shape: tuple[int, ...], chunk: StoredChunk, held: Holding) -> Runs:
    """From elements of a chunk to elements of the local tensor, ascending in the chunk."""
    if chunk.sizes == shape:  # there are many such, and they are small
        return Runs(held.runs.source_start, held.runs.source, held.runs.start, held.runs.length)
    strides = _strides(shape)
    first = sum(o * step for o, step in zip(chunk.offsets, strides, strict=True))
    box = strided(first, chunk.sizes, strides, 0)
    mine = held.runs
    a, b, start, length = overlap(box.source_start, box.length, mine.start, mine.length)
    in_chunk = box.start[a] + (start - box.source_start[a])
    in_target = mine.source_start[b] + (start - mine.start[b])
    return coalesce(Runs(in_target, np.zeros(len(a), dtype=np.int64), in_chunk, length))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _batches(jobs: Iterator[_Job], limits: Limits) -> Iterator[list[_Job]]:
    """Jobs one by one, but small ones that lie close together in a file as one list."""
    batch: list[_Job] = []
    for job in jobs:
        if batch and not _joins(batch, job, limits):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _joins(batch: Sequence[_Job], job: _Job, limits: Limits) -> bool:
    first, last = batch[0], batch[-1]
    return (
        max(first.length_bytes, job.length_bytes) <= limits.small_bytes
        and first.chunk.blob.file == job.chunk.blob.file
        and job.begin - (last.begin + last.length_bytes) <= limits.gap_bytes
        and job.begin + job.length_bytes - first.begin <= limits.buffer_bytes
    )


def _row_major(job: _Job, payload: Payload, raw: torch.Tensor) -> torch.Tensor:
    """The bytes of a chunk's elements in row-major order, however they were stored."""
    if payload.stride is None:
        return raw
    values = raw.clone().view(job.dtype).as_strided(job.chunk.sizes, payload.stride)  # the clone is aligned
    return values.reshape(-1).view(torch.uint8)


def _scatter(job: _Job, block: torch.Tensor, first: int, limits: Limits) -> None:
    """Copy what the rank needs of a block of a chunk, its bytes from element `first` on, to where it belongs."""
    size = job.dtype.itemsize
    count = len(block) // size
    pieces = job.pieces
    if first == 0 and count >= job.chunk.elements:
        target, source, length = pieces.start, pieces.source_start, pieces.length
    else:
        _, p, begin, length = overlap(np.array([first]), np.array([count]), pieces.source_start, pieces.length)
        target, source = pieces.start[p] + (begin - pieces.source_start[p]), begin - first
    if not len(length):
        return
    if len(length) == 1 or int(length.mean()) * size >= limits.long_piece_bytes:
        for t, s, n in zip((target * size).tolist(), (source * size).tolist(), (length * size).tolist(), strict=True):
            job.memory[t : t + n].copy_(block[s : s + n])
        return
    # Short pieces, such as rows: all at once, in units of the largest size that all begins and lengths are made of.
    unit = int(np.gcd.reduce(np.concatenate([target, source, length])))
    counts = length // unit
    within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    into = np.repeat(target // unit, counts) + within
    rows = _in_units(block, unit * size).take(np.repeat(source // unit, counts) + within)
    device = job.memory.device
    if device.type == "cpu":
        _in_units(job.memory, unit * size)[into] = rows
    else:
        units = job.memory[: len(job.memory) // (unit * size) * unit * size].view(-1, unit * size)
        moved = torch.from_numpy(rows.view(np.uint8)).view(-1, unit * size)
        units.index_copy_(0, torch.from_numpy(into).to(device), moved.to(device))


def _in_units(memory: torch.Tensor, unit_bytes: int) -> npt.NDArray[np.void]:
    """The memory as units of so many bytes, which numpy copies whole: ten times as fast as torch's rows of bytes."""
    return memory[: len(memory) // unit_bytes * unit_bytes].numpy().view(np.dtype((np.void, unit_bytes)))
