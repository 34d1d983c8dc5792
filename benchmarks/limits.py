"""The limits that saves are measured against: a bare copy, and a bare durable write, of the same bytes."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

_BLOCK_BYTES = 4 << 20
_BUFFER_BYTES = 256 << 20


class WarmCopy:
    """memcpy of tensors into one buffer that is there already: the floor of any snapshot that blocks.

    With `buffer_bytes` the buffer has that size and is used again and again, where memory is short.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], *, buffer_bytes: int | None = None) -> None:
        whole = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
        self.total_bytes = sum(map(len, whole))
        size = buffer_bytes or self.total_bytes
        self._origins = [part for origin in whole for part in origin.split(size) if len(part)]
        buffer = torch.zeros(size, dtype=torch.uint8)
        self._targets, position = [], 0
        for origin in self._origins:
            position = position if position + len(origin) <= size else 0
            self._targets.append(buffer[position : position + len(origin)])
            position += len(origin)

    def seconds(self) -> float:
        begin = time.perf_counter()
        torch._foreach_copy_(self._targets, self._origins)
        return time.perf_counter() - begin


class BareWrite:
    """pwrite of a buffer, again and again, and fsync: direct I/O, preallocated, two threads, blocks of 4 MiB.

    Of the settings tried on this kind of machine the fastest, so the hardest to come close to. Each process writes
    a file of its own.
    """

    def __init__(self, path: Path, total_bytes: int) -> None:
        self._path = path
        self._size = -(-total_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        self._held = min(self._size, _BUFFER_BYTES)
        self._buffer = mmap.mmap(-1, self._held, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)

    def seconds(self) -> float:
        self._path.unlink(missing_ok=True)
        view = memoryview(self._buffer)
        begin = time.perf_counter()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
        try:
            os.posix_fallocate(descriptor, 0, self._size)

            def write(first: int) -> None:
                for offset in range(first * _BLOCK_BYTES, self._size, 2 * _BLOCK_BYTES):
                    start = offset % self._held
                    os.pwrite(descriptor, view[start : start + _BLOCK_BYTES], offset)

            threads = [threading.Thread(target=write, args=(first,)) for first in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        elapsed = time.perf_counter() - begin
        self._path.unlink()
        return elapsed
