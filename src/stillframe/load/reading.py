"""Reading runs of stored tensors into memory: large reads, no more bytes than are asked for, bounded extra memory.

Bytes go straight into their destination where that is CPU memory of the stored dtype, else through one buffer of
bounded size, from which torch casts and copies them. A permuted (transposed) tensor is read one outermost slice at a
time, such as one expert's matrix, and that slice is permuted in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stillframe.errors import CorruptCheckpoint, LoadError
from stillframe.layout.runs import Ints, Runs, overlap
from stillframe.load.dequantizing import Dequantizer, Scales
from stillframe.load.directory import WeightFile
from stillframe.load.safetensors import StoredTensor
from stillframe.load.sources import Permutation, Source

_BOUNCE_BYTES = 16 << 20
_MAX_BUFFERS = 1024  # IOV_MAX on Linux: how many places one preadv can read into
_MAX_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB less a page at once


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Bytes that follow each other in a file, `count` elements, and where they go: `(start, length)` in elements."""

    file: int
    file_offset: int
    dtype: torch.dtype
    count: int
    places: list[tuple[int, int]]


class Reader:
    """Fills tensors from the runs of `sources` that they consist of. `bytes_read` counts the data read so far."""

    def __init__(
        self,
        files: Sequence[WeightFile],
        sources: Sequence[Source],
        *,
        scales: Mapping[str, Scales] | None = None,
        bounce_bytes: int = _BOUNCE_BYTES,
        max_read_bytes: int = _MAX_READ_BYTES,
    ) -> None:
        self._files = files
        stored = {tensor.name: (index, tensor) for index, file in enumerate(files) for tensor in file.tensors}
        self._sources = [(*stored[source.key], source.permutation) for source in sources]
        scales = scales or {}
        self._scales = [scales.get(source.key) for source in sources]
        self._file_of = {key: stored[found.tensor.name][0] for key, found in scales.items()}
        self._bounce_bytes = bounce_bytes
        self._max_read_bytes = max_read_bytes
        self._bounce: torch.Tensor | None = None  # made when first needed: most loads read straight into place
        self.bytes_read = 0

    def position(self, runs: Runs) -> tuple[int, int]:
        """File and offset of the first of the stored tensors that `runs` point into, to read in the files' order."""
        return min((self._sources[s][0], self._sources[s][1].file_offset) for s in np.unique(runs.source).tolist())

    def stored_names(self, runs: Runs) -> set[str]:
        """The stored tensors that `runs` point into, and their scales."""
        used = np.unique(runs.source).tolist()
        scales = [self._scales[source] for source in used]
        return {self._sources[s][1].name for s in used} | {found.tensor.name for found in scales if found is not None}

    @torch.no_grad()
    def fill(self, flat: torch.Tensor, runs: Runs) -> None:
        """Fill `flat`, contiguous and of one dimension, whose elements `Runs.start` counts; values are cast as by
        `Tensor.copy_`, those that have scales after they are multiplied. Raises CorruptCheckpoint where a file has
        become shorter, LoadError where reading fails.
        """
        scaled = np.array([self._scales[s] is not None for s in runs.source.tolist()], dtype=bool)
        for source in np.unique(runs.source[scaled]).tolist():
            self._fill_scaled(flat, _take(runs, runs.source == source), source)
        runs = _take(runs, ~scaled)
        permuted = np.array([self._sources[s][2] is not None for s in runs.source.tolist()], dtype=bool)
        for stretch in self._stretches(_take(runs, ~permuted)):
            if flat.device.type == "cpu" and flat.dtype == stretch.dtype:
                self._read_direct(flat, stretch)
            else:
                self._read_bounced(flat, stretch)
        runs = _take(runs, permuted)
        for source in np.unique(runs.source).tolist():
            self._read_permuted(flat, _take(runs, runs.source == source), *self._sources[source])

    def _fill_scaled(self, flat: torch.Tensor, runs: Runs, source: int) -> None:
        """Fill from one source whose stored values are multiplied by scales; of these the rows that are needed."""
        file, tensor, permutation = self._sources[source]
        scales = self._scales[source]
        assert scales is not None
        low, high = 0, math.prod(tensor.shape)
        if permutation is None:
            low, high = int(runs.source_start.min()), int((runs.source_start + runs.length).max())
        first, count = scales.rows_of(tensor, low, high)
        stored, row = scales.tensor, scales.tensor.shape[-1]
        values = torch.empty(count, row, dtype=stored.dtype, device="cpu")
        begin = stored.file_offset + first * row * stored.dtype.itemsize
        self._read_into(self._file_of[tensor.name], begin, [values.view(-1).view(torch.uint8).numpy().data])
        dequantize = Dequantizer(tensor, scales, first, values.to(torch.float32))
        if permutation is not None:
            self._read_permuted(flat, runs, file, tensor, permutation, dequantize)
            return
        for stretch in self._stretches(runs):
            self._read_bounced(flat, stretch, dequantize)

    def _stretches(self, runs: Runs) -> Iterator[_Stretch]:
        if not len(runs):
            return
        stored = [self._sources[s] for s in range(int(runs.source.max()) + 1)]
        file = np.array([index for index, _, _ in stored], dtype=np.int64)[runs.source]
        base = np.array([tensor.file_offset for _, tensor, _ in stored], dtype=np.int64)[runs.source]
        size = np.array([tensor.dtype.itemsize for _, tensor, _ in stored], dtype=np.int64)[runs.source]
        offset = base + runs.source_start * size
        order = np.lexsort((offset, file))
        runs, file, offset, size = _take(runs, order), file[order], offset[order], size[order]
        ends = offset + runs.length * size
        dtypes = [stored[s][1].dtype for s in runs.source.tolist()]
        same_dtype = np.array([a == b for a, b in zip(dtypes[1:], dtypes[:-1], strict=True)], dtype=bool)
        continues = (file[1:] == file[:-1]) & (offset[1:] == ends[:-1]) & same_dtype
        heads = np.flatnonzero(np.concatenate(([True], ~continues))).tolist()
        places = list(zip(runs.start.tolist(), runs.length.tolist(), strict=True))
        for head, end in zip(heads, [*heads[1:], len(runs)], strict=True):
            count = int(runs.length[head:end].sum())
            yield _Stretch(int(file[head]), int(offset[head]), dtypes[head], count, places[head:end])

    def _read_direct(self, flat: torch.Tensor, stretch: _Stretch) -> None:
        memory = flat.view(torch.uint8).numpy().data
        size = flat.dtype.itemsize
        places = [memory[start * size : (start + length) * size] for start, length in stretch.places]
        self._read_into(stretch.file, stretch.file_offset, places)

    def _read_bounced(self, flat: torch.Tensor, stretch: _Stretch, dequantize: Dequantizer | None = None) -> None:
        size = stretch.dtype.itemsize
        if self._bounce is None:
            self._bounce = torch.empty(self._bounce_bytes, dtype=torch.uint8, device="cpu")
        # Multiplied values take 4 bytes each, and while they are made again 4.
        window = max(1, self._bounce_bytes // (size if dequantize is None else 16))
        lengths = np.array([length for _, length in stretch.places], dtype=np.int64)
        starts = np.array([start for start, _ in stretch.places], dtype=np.int64)
        before = np.cumsum(lengths) - lengths
        for low in range(0, stretch.count, window):
            high = min(low + window, stretch.count)
            part = self._bounce[: (high - low) * size]
            self._read_into(stretch.file, stretch.file_offset + low * size, [part.numpy().data])
            values = part.view(stretch.dtype)
            if dequantize is not None:
                values = dequantize(values, stretch.file_offset + low * size)
            _, p, begin, length = overlap(np.array([low]), np.array([high - low]), before, lengths)
            into = starts[p] + begin - before[p]
            for target, origin, count in zip(into.tolist(), (begin - low).tolist(), length.tolist(), strict=True):
                flat[target : target + count].copy_(values[origin : origin + count])

    def _read_permuted(
        self,
        flat: torch.Tensor,
        runs: Runs,
        file: int,
        tensor: StoredTensor,
        permutation: Permutation | None,
        dequantize: Dequantizer | None = None,
    ) -> None:
        assert permutation is not None
        outer, extent = _slices(permutation)
        shape, stride = permutation.shape[outer:], permutation.stride[outer:]
        starts = _offsets(permutation, outer)
        block = math.prod(shape)
        blocks = np.arange(len(starts), dtype=np.int64) * block
        r, b, begin, length = overlap(runs.source_start, runs.length, blocks, np.full(len(blocks), block))
        into = runs.start[r] + begin - runs.source_start[r]
        size = tensor.dtype.itemsize
        for index in np.unique(b).tolist():
            raw = torch.empty(extent * size, dtype=torch.uint8, device="cpu")
            offset = tensor.file_offset + int(starts[index]) * size
            self._read_into(file, offset, [raw.numpy().data])
            stored = raw.view(tensor.dtype)
            if dequantize is not None:
                stored = dequantize(stored, offset)
            values = stored.as_strided(shape, stride).reshape(-1)
            mine = b == index
            origin = begin[mine] - blocks[index]
            for t, o, n in zip(into[mine].tolist(), origin.tolist(), length[mine].tolist(), strict=True):
                flat[t : t + n].copy_(values[o : o + n])

    def _read_into(self, file: int, offset: int, places: list[memoryview]) -> None:
        opened = self._files[file]
        self.bytes_read += read_into(
            opened.path, opened.descriptor, offset, places, self._max_read_bytes, tensors=opened.tensors
        )


def read_into(
    path: Path,
    descriptor: int,
    offset: int,
    places: Sequence[memoryview],
    max_read_bytes: int = _MAX_READ_BYTES,
    *,
    tensors: Sequence[StoredTensor] = (),
) -> int:
    """Read consecutive bytes of a file into `places`, one after the other; returns how many they are.

    Raises CorruptCheckpoint where the file ends before, LoadError where reading fails, with that of the file's
    `tensors` in which it does.
    """
    waiting = [place for place in reversed(places) if len(place)]
    begin = offset
    while waiting:
        batch: list[memoryview] = []
        batch_bytes = 0
        while waiting and len(batch) < _MAX_BUFFERS and batch_bytes < max_read_bytes:
            place, room = waiting.pop(), max_read_bytes - batch_bytes
            if len(place) > room:
                waiting.append(place[room:])
                place = place[:room]
            batch.append(place)
            batch_bytes += len(place)
        try:
            got = os.preadv(descriptor, batch, offset)
        except OSError as error:
            where = f"{offset}{_of_tensor(offset, tensors)}"
            raise LoadError(f"{path}: cannot read {batch_bytes} bytes from byte {where}: {error}") from error
        if not got:
            where = f"{offset}{_of_tensor(offset, tensors)}"
            raise CorruptCheckpoint(f"{path}: ended at byte {where} while it was being read")
        offset += got
        waiting.extend(reversed(left_to_read(batch, got)))
    return offset - begin


def _of_tensor(offset: int, tensors: Sequence[StoredTensor]) -> str:
    found = (t.name for t in tensors if t.file_offset <= offset < t.file_offset + t.length_bytes)
    name = next(found, None)
    return "" if name is None else f" (of {name!r})"


def left_to_read(places: list[memoryview], got: int) -> list[memoryview]:
    """What of `places` is still to be read after a read of `got` bytes."""
    for index, place in enumerate(places):
        if got < len(place):
            return [place[got:], *places[index + 1 :]]
        got -= len(place)
    return []


def _slices(permutation: Permutation) -> tuple[int, int]:
    """How many outer dimensions step over whole, separate slices of memory, and the extent in elements of a slice."""
    shape, stride = permutation.shape, permutation.stride
    extents = [1 + sum((n - 1) * s for n, s in zip(shape[d:], stride[d:], strict=True)) for d in range(len(shape) + 1)]
    outer = 0
    while outer < len(shape) and stride[outer] >= extents[outer + 1] and extents[outer + 1] > 1:
        outer += 1
    return outer, extents[outer]


def _offsets(permutation: Permutation, outer: int) -> Ints:
    """The first element of each slice, in the permutation's order."""
    starts = np.array([permutation.offset], dtype=np.int64)
    for size, step in zip(permutation.shape[:outer], permutation.stride[:outer], strict=True):
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * step).reshape(-1)
    return starts


def _take(runs: Runs, index: Ints | np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Runs:
    return Runs(runs.start[index], runs.source[index], runs.source_start[index], runs.length[index])
