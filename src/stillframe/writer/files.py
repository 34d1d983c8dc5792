"""Write a rank's share of each file from the arena, durably, while other ranks write theirs into the same files.

Never touches a byte that the share does not name: no truncation, no read-modify-write, and nothing but whole pages of
its own by direct I/O, so that two ranks whose shares meet inside a page do not lose each other's bytes. Files only
ever grow, to the size that all ranks know.

Blocks go to the disk file by file on a few threads, of each file those through the page cache first; whichever thread
ends a file fsyncs it while the others go on with the next. Two threads and 4 MiB blocks measured best: one thread
leaves the disk idle during checksums, more only fight the training for cores, and smaller blocks pay per call.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from awscrt.checksums import combine_crc64nvme, crc64nvme

from stillframe.records import FileReceipt, WrittenExtent
from stillframe.writer.blocks import DIRECT_ALIGNMENT_BYTES, Block, FileBlocks
from stillframe.writer.directory import FileWriteError, OpenDirectory, close_file, pwrite_fully, sync_file

BLOCK_BYTES = 4 << 20

# fallocate(2) itself. os.posix_fallocate will not do: on a file system that cannot preallocate (NFS before 4.2), glibc
# emulates it by writing a zero into every block, which would race with the bytes that other ranks are writing there.
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
# What file systems answer that have no preallocation. The size is then set alone, and blocks are found while writing.
_NO_PREALLOCATION = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class Stopped(Exception):
    """`stop` was set; blocks that were under way are written, no file is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteMethod:
    """How blocks reach the disk. The defaults are what measured best; a test or benchmark may choose otherwise.

    `bytes_per_s_max` is what is asked for, on average from the first block on: None is as fast as it goes.
    """

    threads: int = 2
    direct: bool = True
    preallocate: bool = True
    bytes_per_s_max: float | None = None


def write_files(
    directory: OpenDirectory,
    arena: memoryview,
    files: Sequence[FileBlocks],
    *,
    stop: threading.Event,
    on_progress: Callable[[int], None],
    method: WriteMethod | None = None,
) -> tuple[FileReceipt, ...]:
    """Write all extents of `files` from `arena` and fsync each file once; blocks until that is done.

    On return the content and size of every file are durable; its name only after `directory.sync()`. The receipts are
    in the order of `files`. `on_progress` is called with the bytes of each block as it is written, from any thread.

    Raises `FileWriteError` if the operating system refuses anything, and `Stopped` between two blocks once `stop` is
    set; no thread is left running. `arena` should be page-aligned, or direct I/O falls back to the page cache.
    """
    method = method or WriteMethod()
    run = _Run(directory, arena, files, stop, on_progress, method)
    with ThreadPoolExecutor(method.threads, thread_name_prefix="stillframe-write") as pool:
        workers = [pool.submit(run.work) for _ in range(method.threads)]
    run.close()
    errors = [error for worker in workers if (error := worker.exception()) is not None]
    if errors:
        # What a second thread met is mostly the same (a full disk); it is kept with the first, not lost.
        for other in errors[1:]:
            errors[0].add_note(f"another writing thread: {type(other).__name__}: {other}")
        raise errors[0]
    return tuple(file.receipt() for file in run.files)


class _Run:
    """One call of `write_files`: the queue of blocks that its threads take from, in order."""

    def __init__(
        self,
        directory: OpenDirectory,
        arena: memoryview,
        files: Sequence[FileBlocks],
        stop: threading.Event,
        on_progress: Callable[[int], None],
        method: WriteMethod,
    ) -> None:
        self.files = [_SharedFile(directory, file, method) for file in files]
        self._arena = arena
        self._stop = stop
        self._on_progress = on_progress
        self._failed = threading.Event()
        self._pace = _Pace(method.bytes_per_s_max)
        self._queue = iter([(file, index) for file in self.files for index in _order(file.blocks)])
        self._lock = threading.Lock()

    def work(self) -> None:
        gatherer = _Gatherer(self._arena)
        try:
            while not self._failed.is_set() and (task := self._take()) is not None:
                file, index = task
                if file.blocks:
                    self._pace.wait(file.blocks[index].length_bytes, self._stop)
                if self._stop.is_set():
                    raise Stopped
                file.open()
                if file.blocks:
                    file.write(index, gatherer)
                    self._on_progress(file.blocks[index].length_bytes)
                file.finish_one()
        except BaseException:
            self._failed.set()
            raise
        finally:
            gatherer.close()

    def _take(self) -> tuple[_SharedFile, int] | None:
        with self._lock:
            return next(self._queue, None)

    def close(self) -> None:
        """Close what a failed run left open; after a whole one nothing is."""
        for file in self.files:
            file.close()


class _Pace:
    """Lets each block begin when those before it have had their time, at so many bytes a second."""

    def __init__(self, bytes_per_s_max: float | None) -> None:
        self._bytes_per_s_max = bytes_per_s_max
        self._free_at_s = time.monotonic()
        self._lock = threading.Lock()

    def wait(self, length_bytes: int, stop: threading.Event) -> None:
        """Block until a block of so many bytes may begin, or `stop` is set."""
        if self._bytes_per_s_max is None:
            return
        with self._lock:
            begin_s = max(self._free_at_s, time.monotonic())
            self._free_at_s = begin_s + length_bytes / self._bytes_per_s_max
        stop.wait(max(0.0, begin_s - time.monotonic()))


class _Gatherer:
    """The bytes of blocks as one piece of memory: the arena's own, or a copy where they do not lie there as one."""

    def __init__(self, arena: memoryview) -> None:
        self._arena = arena
        self._map: mmap.mmap | None = None  # made when first needed; aligned to pages, as direct I/O wants

    def data_of(self, block: Block) -> memoryview:
        """The block's bytes, to be released before the next block's are asked for."""
        if block.arena_offset is not None:
            return self._arena[block.arena_offset : block.arena_offset + block.length_bytes]
        if self._map is None or len(self._map) < block.length_bytes:
            self.close()
            self._map = mmap.mmap(-1, max(BLOCK_BYTES, block.length_bytes))
        position = 0
        with memoryview(self._map) as gathered:
            for piece in block.pieces:
                with self._arena[piece.arena_offset : piece.arena_offset + piece.length_bytes] as part:
                    gathered[position : position + piece.length_bytes] = part
                position += piece.length_bytes
            return gathered[: block.length_bytes]

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


class _SharedFile:
    """One file while its blocks are written; open from its first block to its fsync."""

    def __init__(self, directory: OpenDirectory, file: FileBlocks, method: WriteMethod) -> None:
        self.share = file.share
        self.blocks = file.blocks
        self._directory = directory
        self._method = method
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._direct_fd: int | None = None
        self._unfinished = max(1, len(file.blocks))
        self._piece_crcs: list[list[int]] = [[] for _ in file.blocks]

    def open(self) -> None:
        """Open the file and give it its size, if no other thread did."""
        with self._lock:
            if self._fd is not None:
                return
            self._fd = self._directory.open_shared(self.share.name)
            self._grow(self._fd)
            if self._method.direct and any(block.direct for block in self.blocks):
                self._direct_fd = self._open_direct()

    def write(self, index: int, gatherer: _Gatherer) -> None:
        """Checksum block `index`, then write it: its bytes are in the processor's cache by then."""
        block = self.blocks[index]
        with gatherer.data_of(block) as data:
            self._piece_crcs[index] = _piece_crcs(block, data)
            written_bytes = self._write_direct(block, data) if block.direct else 0
            assert self._fd is not None
            with data[written_bytes:] as rest:
                pwrite_fully(self._fd, rest, block.file_offset + written_bytes, self.share.name)

    def finish_one(self) -> None:
        """Count a block as written; the last one fsyncs the file, checks its size, and closes it."""
        with self._lock:
            self._unfinished -= 1
            if self._unfinished:
                return
        assert self._fd is not None
        sync_file(self._fd, self.share.name)
        size_bytes = os.fstat(self._fd).st_size
        if size_bytes != self.share.size_bytes:
            cause = OSError(errno.EIO, f"it should have {self.share.size_bytes} bytes, and has {size_bytes}")
            raise FileWriteError("writing", self.share.name, cause)
        self.close()

    def receipt(self) -> FileReceipt:
        crcs = [0] * len(self.share.extents)
        for block, piece_crcs in zip(self.blocks, self._piece_crcs, strict=True):
            for piece, crc in zip(block.pieces, piece_crcs, strict=True):
                crcs[piece.extent_index] = combine_crc64nvme(crcs[piece.extent_index], crc, piece.length_bytes)
        extents = (
            WrittenExtent(file_offset=extent.file_offset, length_bytes=extent.length_bytes, crc64nvme=crc)
            for extent, crc in zip(self.share.extents, crcs, strict=True)
        )
        return FileReceipt(name=self.share.name, size_bytes=self.share.size_bytes, extents=tuple(extents))

    def close(self) -> None:
        with self._lock:
            open_fds = [fd for fd in (self._direct_fd, self._fd) if fd is not None]
            self._direct_fd = self._fd = None
        for fd in open_fds:
            close_file(fd, self.share.name)

    def _grow(self, fd: int) -> None:
        """Give the file its size, with space behind it where the file system can; other ranks do the same at once.

        Besides finding a full disk before anything is written, and writing faster, a size that is set first keeps an
        NFS client from filling the rest of a last page with zeros, over what another node writes there.
        """
        name, size_bytes = self.share.name, self.share.size_bytes
        try:
            found_bytes = os.fstat(fd).st_size
            if found_bytes > size_bytes:
                raise OSError(errno.EFBIG, f"it has {found_bytes} bytes already, more than the {size_bytes} to write")
            if self._method.preallocate and size_bytes and _preallocate(fd, size_bytes):
                return
            if found_bytes < size_bytes:
                os.ftruncate(fd, size_bytes)
        except OSError as error:
            raise FileWriteError(f"allocating {size_bytes} bytes for", name, error) from error

    def _open_direct(self) -> int | None:
        try:
            return self._directory.open_shared(self.share.name, os.O_DIRECT)
        except FileWriteError as error:
            if error.errno == errno.EINVAL:
                return None  # open(2): the file system has no direct I/O
            raise

    def _write_direct(self, block: Block, data: memoryview) -> int:
        """Write what can be written around the page cache, and say how many bytes that was; the rest is buffered."""
        written_bytes = 0
        while written_bytes < len(data) and written_bytes % DIRECT_ALIGNMENT_BYTES == 0:
            direct_fd = self._direct_fd
            if direct_fd is None:
                break
            offset = block.file_offset + written_bytes
            try:
                with data[written_bytes:] as rest:
                    count = os.pwrite(direct_fd, rest, offset)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    break  # this device wants a larger alignment than ours; if it is something else, the rest says so
                action = f"writing {len(data) - written_bytes} bytes at offset {offset} of"
                raise FileWriteError(action, self.share.name, error) from error
            if count == 0:
                break
            written_bytes += count
        return written_bytes


def _order(blocks: Sequence[Block]) -> list[int]:
    """The indices of `blocks` in the order of writing; of no blocks, one that stands for opening and syncing the file.

    A buffered write takes the file's lock for itself and so waits for every direct one that is under way, of other
    ranks too. Between direct writes, the small ones at the edges of runs cost a tenth of the time of a save.
    """
    return sorted(range(max(1, len(blocks))), key=lambda index: bool(blocks) and blocks[index].direct)


def _piece_crcs(block: Block, data: memoryview) -> list[int]:
    crcs = []
    start = 0
    for piece in block.pieces:
        with data[start : start + piece.length_bytes] as piece_data:
            crcs.append(crc64nvme(piece_data))
        start += piece.length_bytes
    return crcs


def _preallocate(fd: int, size_bytes: int) -> bool:
    """Whether the file system has set `size_bytes` aside for the file; raises OSError if it tried and failed."""
    while _fallocate(fd, 0, 0, size_bytes) != 0:
        code = ctypes.get_errno()
        if code in _NO_PREALLOCATION:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
