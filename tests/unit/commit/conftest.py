"""Files that resist, for the commit's tests."""

from __future__ import annotations

import array
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# ioctl_iflags(2)
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IMMUTABLE_FL = 0x10


def _change_flags(descriptor: int, *, immutable: bool) -> None:
    flags = array.array("l", [0])
    fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags)
    flags[0] = flags[0] | _FS_IMMUTABLE_FL if immutable else flags[0] & ~_FS_IMMUTABLE_FL
    fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, flags)


@pytest.fixture
def immutable() -> Iterator[Callable[[Path], None]]:
    """Make a file or directory one that not even root removes or renames; skips where that cannot be done."""
    descriptors: list[int] = []  # its directory may be renamed meanwhile

    def make(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _change_flags(descriptor, immutable=True)
        except OSError as error:
            os.close(descriptor)
            pytest.skip(f"nothing can be made immutable here: {error}")
        descriptors.append(descriptor)

    yield make
    for descriptor in descriptors:
        _change_flags(descriptor, immutable=False)
        os.close(descriptor)
