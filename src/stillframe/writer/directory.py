"""Names, descriptors and durability inside one directory that is held open.

Everything is reached relative to one descriptor and no symbolic link is followed on the way, so what is written lands
in the directory that was opened, even if its path is renamed or taken by another attempt meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from types import TracebackType
from typing import Self

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE_MODE = 0o666  # the umask takes its part, as for any file that a program of the user's makes
_NEW_DIRECTORY_MODE = 0o777


class FileWriteError(OSError):
    """The operating system refused something; the text says what, on which file, where, and the errno's name.

    `errno` and `strerror` are those of the cause; `file_name` is relative to the directory of the save.
    """

    def __init__(self, action: str, file_name: str, cause: OSError) -> None:
        super().__init__(cause.errno, cause.strerror)
        self.action = action
        self.file_name = file_name

    def __str__(self) -> str:
        code = errno.errorcode.get(self.errno or 0, str(self.errno))
        hint = "; it is a symbolic link, and a save follows none" if self.errno == errno.ELOOP else ""
        return f"{self.action} {self.file_name!r} failed: {self.strerror} ({code}){hint}"


class OpenDirectory:
    """A directory held open, and those of its subdirectories that were used.

    Names are relative to it and may lead into subdirectories ("a/b.txt"), which are made when a file is created there;
    a name that is absolute, or has an empty, "." or ".." part, raises ValueError. Every OSError of a file operation
    becomes a `FileWriteError`. Safe to use from several threads. Leaving the context closes the descriptors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`; raises `FileWriteError` if it is missing, no directory, or a symbolic link."""
        self.path = os.fspath(path)
        try:
            self._root_fd = os.open(self.path, _DIRECTORY_FLAGS)
        except OSError as error:
            raise FileWriteError("opening the directory", self.path, error) from error
        self._subdirectory_fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            for fd in (*self._subdirectory_fds.values(), self._root_fd):
                os.close(fd)
            self._subdirectory_fds.clear()

    def has_file(self, name: str) -> bool:
        """Whether `name` is here as a regular file (not as a link to one)."""
        try:
            directory_fd, leaf = self._locate(name, create=False)
            return stat.S_ISREG(os.stat(leaf, dir_fd=directory_fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise FileWriteError("looking for", name, error) from error

    def open_shared(self, name: str, extra_flags: int = 0) -> int:
        """A descriptor to write `name`, which other ranks may be creating and writing too; never truncates it."""
        try:
            directory_fd, leaf = self._locate(name, create=True)
            return os.open(leaf, _FILE_FLAGS | extra_flags, _NEW_FILE_MODE, dir_fd=directory_fd)
        except OSError as error:
            raise FileWriteError("opening", name, error) from error

    def write_new(self, name: str, content: bytes) -> None:
        """Create `name`, which must not exist, with `content`. The content is durable on return; the name not yet."""
        fd = self.open_shared(name, os.O_EXCL)
        try:
            pwrite_fully(fd, memoryview(content), 0, name)
            sync_file(fd, name)
        finally:
            close_file(fd, name)

    def replace(self, name: str, content: bytes) -> None:
        """Give `name` a new content, whole or not at all, whatever was there. Content and name are durable on return.

        The directory that holds it must exist already.
        """
        temporary_name = f"{name}.{os.getpid()}.tmp"
        self.write_new(temporary_name, content)
        try:
            directory_fd, leaf = self._locate(name, create=False)
            temporary_leaf = temporary_name.rpartition("/")[2]
            os.rename(temporary_leaf, leaf, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except OSError as error:
            raise FileWriteError("renaming the new content into place as", name, error) from error
        _sync_directory(directory_fd, name.rpartition("/")[0] or self.path)

    def sync(self) -> None:
        """Make every name that was created here durable; on return it survives a power loss."""
        with self._lock:
            deepest_first = sorted(self._subdirectory_fds.items(), key=lambda item: -item[0].count("/"))
        for name, fd in deepest_first:
            _sync_directory(fd, name)
        _sync_directory(self._root_fd, self.path)

    def _locate(self, name: str, *, create: bool) -> tuple[int, str]:
        """The descriptor of the directory that holds `name`, and the last part of the name."""
        parts = name.split("/")
        if "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{name!r} is no name inside a directory: it is absolute, or has an empty or dotted part")
        fd = self._root_fd
        with self._lock:
            for depth in range(1, len(parts)):
                prefix = "/".join(parts[:depth])
                if prefix not in self._subdirectory_fds:
                    if create:
                        _make_directory(parts[depth - 1], fd)
                    self._subdirectory_fds[prefix] = os.open(parts[depth - 1], _DIRECTORY_FLAGS, dir_fd=fd)
                fd = self._subdirectory_fds[prefix]
        return fd, parts[-1]


def pwrite_fully(fd: int, data: memoryview, offset: int, name: str) -> None:
    """Write all of `data` at `offset`, however many calls it takes."""
    written_bytes = 0
    while written_bytes < len(data):
        try:
            with data[written_bytes:] as rest:
                count = os.pwrite(fd, rest, offset + written_bytes)
            if count == 0:
                raise OSError(errno.EIO, "the kernel took no byte and gave no reason")
        except OSError as error:
            action = f"writing {len(data) - written_bytes} bytes at offset {offset + written_bytes} of"
            raise FileWriteError(action, name, error) from error
        written_bytes += count


def sync_file(fd: int, name: str) -> None:
    """fsync, once. A failed one is never tried again: the kernel has marked the lost pages clean, so it would succeed.

    See https://wiki.postgresql.org/wiki/Fsync_Errors.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        raise FileWriteError("fsync of", name, error) from error


def close_file(fd: int, name: str) -> None:
    """Close, once: after an error the descriptor is gone all the same (close(2))."""
    try:
        os.close(fd)
    except OSError as error:
        raise FileWriteError("closing", name, error) from error


def _make_directory(leaf: str, parent_fd: int) -> None:
    try:
        os.mkdir(leaf, _NEW_DIRECTORY_MODE, dir_fd=parent_fd)
    except FileExistsError:
        return  # made by another rank, or before; what it is shows when it is opened as a directory


def _sync_directory(fd: int, name: str) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        # EINVAL is how a file system says that it has no fsync of directories (some FUSE and SMB mounts); such a
        # one commits names by itself or not at all, and no call would change that.
        if error.errno != errno.EINVAL:
            raise FileWriteError("fsync of the directory", name, error) from error
