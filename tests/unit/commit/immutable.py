"""Files that resist: not even root removes or renames them (ioctl_iflags(2))."""

from __future__ import annotations

import array
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IMMUTABLE_FL = 0x10


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Make a file or directory immutable while inside, also under another name. Raises OSError where that cannot be."""
    descriptor = os.open(path, os.O_RDONLY)  # its directory may be renamed meanwhile
    try:
        _change_flags(descriptor, immutable=True)
        try:
            yield
        finally:
            _change_flags(descriptor, immutable=False)
    finally:
        os.close(descriptor)


def _change_flags(descriptor: int, *, immutable: bool) -> None:
    flags = array.array("l", [0])
    fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags)
    flags[0] = flags[0] | _FS_IMMUTABLE_FL if immutable else flags[0] & ~_FS_IMMUTABLE_FL
    fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, flags)
