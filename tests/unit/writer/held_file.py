"""Hold a process back inside a system call, for as long as a test needs, by the kernel's own means."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
from pathlib import Path
from typing import Self

import pytest


class HeldFile:
    """A file that nobody can open for writing until it is released: whoever tries waits in open(2).

    It is a read lease (fcntl(2), F_SETLEASE). The kernel tells us that someone wants the file by SIGIO, so a test knows
    that a writer stands in the middle of its work. It breaks the lease by itself after 45 s. Main thread only.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._wanted_fd = os.eventfd(0)
        self._handler_before = signal.signal(signal.SIGIO, lambda *_: os.eventfd_write(self._wanted_fd, 1))
        self._held = False
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            self.__exit__()
            if error.errno == errno.EINVAL:
                pytest.skip(f"no leases on the file system of {path}")
            raise
        self._held = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held:
            self.release()
        os.close(self._fd)
        signal.signal(signal.SIGIO, self._handler_before)
        os.close(self._wanted_fd)

    def wait_until_wanted(self, timeout_s: float = 60.0) -> None:
        poller = select.poll()
        poller.register(self._wanted_fd, select.POLLIN)
        assert poller.poll(timeout_s * 1000), "nobody opened the held file"

    def release(self) -> None:
        fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        self._held = False
