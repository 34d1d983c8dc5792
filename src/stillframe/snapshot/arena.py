"""The arena: page-aligned shared memory, allocated and touched once, that the writer process maps too."""

from __future__ import annotations

import mmap
import os
import weakref

import torch

from stillframe.errors import StillframeError
from stillframe.snapshot.available import available_memory


class Arena:
    """`arena_bytes` of shared memory behind a descriptor (memfd), zeroed and resident when the constructor returns.

    A memfd counts neither against the size of /dev/shm nor as a file that outlives its processes: the memory goes when
    the last process that holds it ends, however it ends. Raises StillframeError if the memory cannot be had.
    """

    def __init__(self, arena_bytes: int) -> None:
        self.size_bytes = max(mmap.PAGESIZE, -(-arena_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        available = available_memory()
        if self.size_bytes > available.size_bytes:
            # Populating more than there is would not fail: the kernel would kill a process, most likely this one.
            raise StillframeError(
                f"cannot allocate {self.size_bytes} bytes of shared memory for this rank's snapshot: "
                f"{available.size_bytes} bytes are available {available.where}"
            )
        self.fd = os.memfd_create("stillframe-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, self.size_bytes)
            # Populating now takes the page faults (and any lack of memory) here, not in the first save.
            mapped = mmap.mmap(self.fd, self.size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self.fd)
            raise StillframeError(
                f"cannot allocate {self.size_bytes} bytes of shared memory for this rank's snapshot: {error.strerror}"
            ) from error
        self._close_fd = weakref.finalize(self, os.close, self.fd)  # for an arena that is dropped without `close`
        self.bytes: torch.Tensor = torch.frombuffer(mapped, dtype=torch.uint8)
        """The whole arena as a flat uint8 tensor; empty once it is closed."""

    def close(self) -> None:
        """Give the descriptor back. The mapping goes with its last view; the memory when the writer lets go too."""
        self._close_fd()
        self.fd = -1
        self.bytes = torch.empty(0, dtype=torch.uint8)
