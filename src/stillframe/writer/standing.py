"""Where a writer process stands among the others of its host: its priority, and its turn to write."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

# With autogroups (sched(7)) a session has a niceness towards other sessions, and a writer is a session of its own: what
# its threads have counts for nothing then.
_AUTOGROUP = Path("/proc/self/autogroup")
_POLL_S = 0.05  # flock(2) can wait only for one file, and there are several slots


def lower_priority(nice: int, io_class: str | None) -> list[str]:
    """Give the calling thread, and those that it starts, this priority; what is refused is in the lines returned."""
    refused = []
    if nice:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + nice))
        except OSError as error:
            refused.append(f"niceness {nice} is refused: {error.strerror}")
        try:
            _AUTOGROUP.write_text(str(nice))
        except FileNotFoundError:
            pass  # a kernel without them
        except OSError as error:
            refused.append(f"niceness {nice} of the session's autogroup is refused: {error.strerror}")
    if io_class is not None:
        import psutil  # it takes longer to import than the rest of a writer, and few need it

        classes = {"best-effort": psutil.IOPRIO_CLASS_BE, "idle": psutil.IOPRIO_CLASS_IDLE}
        try:
            psutil.Process().ionice(classes[io_class])
        except (OSError, psutil.Error) as error:
            refused.append(f"the I/O class {io_class!r} is refused: {error}")
    return refused


class Slots:
    """So many of a host's writers write at once: locks on as many files, which the kernel releases when one dies."""

    def __init__(self, directory: str, name: str, count: int) -> None:
        """Make `directory`, for this user alone, if it is not there. Raises OSError, also if it is somebody else's."""
        with contextlib.suppress(FileExistsError):
            Path(directory).mkdir(0o700)
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._fds: list[int] = []
        try:
            status = os.fstat(directory_fd)
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(errno.EPERM, "others may write there", directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            for number in range(count):
                self._fds.append(os.open(f"{name}-{number}.lock", flags, 0o600, dir_fd=directory_fd))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(directory_fd)

    @contextlib.contextmanager
    def turn(self, stop: threading.Event) -> Iterator[bool]:
        """Hold a slot; blocks until one is free. False if `stop` was set before that: none is held then."""
        held = self._take()
        while held is None and not stop.wait(_POLL_S):
            held = self._take()
        try:
            yield held is not None
        finally:
            if held is not None:
                fcntl.flock(held, fcntl.LOCK_UN)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _take(self) -> int | None:
        for fd in self._fds:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
        return None
