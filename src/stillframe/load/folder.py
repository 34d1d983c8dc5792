"""A published directory, opened once: whatever is read of it is reached through that one descriptor.

So a link that moves on (`hf-latest`), or a rename in the middle, cannot mix two checkpoints.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stillframe import names
from stillframe.errors import CorruptCheckpoint, LoadError, NotACheckpoint

MAX_SMALL_BYTES = 1_000_000_000
"""What no file that is read whole (a manifest, an index, metadata) may exceed."""
_LISTED = 10


@dataclass(frozen=True, slots=True)
class Folder:
    """An open directory. `descriptor` is open while the context of `open_folder` is."""

    path: Path
    descriptor: int

    def open_file(self, name: str) -> int:
        """Open a regular file for reading; links are followed, as the Hub's cache consists of them.

        Raises FileNotFoundError, or CorruptCheckpoint for what is no file.
        """
        # Without O_NONBLOCK, opening a named pipe would wait for somebody to write into it.
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self.descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CorruptCheckpoint(f"{self.path / name}: is not a regular file")
        return descriptor

    def open_own_file(self, name: str) -> int:
        """Open a regular file that lies in the directory itself or below it: no link on the way is followed.

        Raises FileNotFoundError, LoadError where it cannot be opened, CorruptCheckpoint for what is no such file.
        """
        with self._beneath(name) as (within, leaf):
            return os.open(leaf, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=within)

    def own_size(self, name: str) -> int:
        """The size in bytes of a file that `open_own_file` would open; raises what it raises."""
        with self._beneath(name) as (within, leaf):
            return os.stat(leaf, dir_fd=within, follow_symlinks=False).st_size

    @contextmanager
    def _beneath(self, name: str) -> Iterator[tuple[int, str]]:
        """The folder of a regular file, as a descriptor, and the file's name in it."""
        *folders, leaf = PurePosixPath(name).parts
        within = os.dup(self.descriptor)
        try:
            for folder in folders:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                inner = os.open(folder, flags, dir_fd=within)
                os.close(within)
                within = inner
            # Looked at before it is opened: opening a device may do something.
            if not stat.S_ISREG(os.stat(leaf, dir_fd=within, follow_symlinks=False).st_mode):
                raise CorruptCheckpoint(
                    f"{self.path / name}: is not a regular file; links are not followed, put the file itself there"
                )
            yield within, leaf
        except FileNotFoundError:
            raise
        except NotADirectoryError as error:
            raise CorruptCheckpoint(
                f"{self.path / name}: lies in something that is no folder of this directory; links are not followed"
            ) from error
        except OSError as error:
            raise LoadError(f"{self.path / name}: cannot be opened: {error.strerror}") from error
        finally:
            os.close(within)

    def read_small(self, name: str) -> bytes | None:
        """The content of a small file, or None if there is no such file."""
        try:
            descriptor = self.open_file(name)
        except FileNotFoundError:
            return None
        return read_whole(self.path / name, descriptor)


@contextmanager
def open_folder(directory: Path) -> Iterator[Folder]:
    """Open a directory of a checkpoint.

    Raises NotACheckpoint where there is none, and for one that is hidden: it was never published.
    """
    folder = Folder(directory, _open(directory))
    try:
        yield folder
    finally:
        os.close(folder.descriptor)


def _open(directory: Path) -> int:
    try:
        resolved = directory.resolve(strict=True)
        hidden = [name for name in (directory.name, resolved.name) if name.startswith(".")]
        # An export and a checkpoint that are published as one lie in one hidden directory until then.
        hidden += [name for name in (resolved.parent.name,) if name.startswith(f".{names.TOGETHER}-")]
        if hidden and directory.is_dir():
            raise NotACheckpoint(
                f"{directory}: {hidden[0]} is hidden, so it was never published and may be incomplete; "
                "load a published one (such as hf-latest or checkpoint-latest), or rename it if it is something else"
            )
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotACheckpoint(f"{directory}: does not exist") from error
    except NotADirectoryError as error:
        raise NotACheckpoint(f"{directory}: is not a directory; give the directory that holds the weights") from error


def is_inside(name: str) -> bool:
    """Whether a file name from a checkpoint stays inside of its directory."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def listed(names: Sequence[str], *, separator: str = ", ") -> str:
    """The first names of a list, and how many more there are."""
    shown = separator.join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown}{separator}and {len(names) - _LISTED} more"


def read_whole(path: Path, descriptor: int) -> bytes:
    """The content of a small file; closes `descriptor`. Raises CorruptCheckpoint where it is too large to be one."""
    try:
        size = os.fstat(descriptor).st_size
        if size > MAX_SMALL_BYTES:
            raise CorruptCheckpoint(f"{path}: has {size} bytes, more than any such file needs")
        return read_fully(path, descriptor, 0, size)
    finally:
        os.close(descriptor)


def read_fully(path: Path, descriptor: int, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; raises CorruptCheckpoint where the file ends before."""
    parts, position = [], offset
    while position < offset + length:
        try:
            part = os.pread(descriptor, offset + length - position, position)
        except OSError as error:
            raise LoadError(f"{path}: cannot read bytes {position} to {offset + length}: {error}") from error
        if not part:
            raise CorruptCheckpoint(f"{path}: ends at byte {position}, before byte {offset + length}; it is truncated")
        parts.append(part)
        position += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
