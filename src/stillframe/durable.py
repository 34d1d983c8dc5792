"""Small file-system steps, each with what is durable when it returns.

Sources: rename(2), renameat2(2), fsync(2); "All File Systems Are Not Created Equal" (OSDI '14) for what a crash keeps.
Large data does not pass here (the writer process does that).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def fsync_dir(directory: Path) -> None:
    """Make the names in `directory` durable: creations, renames and removals before this call survive a crash."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # EINVAL is how a file system says that it has no fsync of directories (some FUSE and SMB mounts); such a
        # one commits names by itself or not at all, and no call would change that.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: after a crash `path` is absent (or what it was), or has all of `content`.

    The content is durable on return; the name only after `fsync_dir` of its directory.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def publish(hidden: Path, final: Path) -> None:
    """Rename a directory, whose content is durable, to its final name; durable on return.

    Raises FileExistsError if `final` exists; nothing is ever replaced. Whatever it raises, `final` is not there.
    """
    if os.path.lexists(final):
        raise FileExistsError(errno.EEXIST, "exists already", str(final))
    # rename(2) would replace an empty directory that appeared since; that loses nothing.
    hidden.rename(final)
    try:
        fsync_dir(final.parent)
    except OSError:
        final.rename(hidden)  # a name that a crash may take back must not be seen
        raise


def exchange(one: Path, other: Path) -> None:
    """Swap two names of one directory in one step (Linux renameat2): at every instant both exist; durable on return.

    Raises OSError where the file system cannot (EINVAL; NFS among them). Whatever it raises, nothing is swapped.
    """
    _exchange(one, other)
    try:
        fsync_dir(one.parent)
    except OSError:
        _exchange(one, other)  # the caller will delete what it takes for the failed one
        raise


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def can_exchange(directory: Path, tag: str) -> bool:
    """Whether `exchange` works in `directory`, found out by doing it with two empty directories."""
    one, other = directory / f".stillframe-probe-{tag}-a", directory / f".stillframe-probe-{tag}-b"
    one.mkdir()
    try:
        other.mkdir()
        try:
            exchange(one, other)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                return False
            raise
        finally:
            other.rmdir()
    finally:
        one.rmdir()
    return True


def replace_link(link: Path, target_name: str, tag: str) -> None:
    """Point the symbolic link `link` at `target_name` (relative, a sibling) in one step; durable on return.

    Replaces a link, and nothing else: raises FileExistsError if something that is no link has its name.
    """
    if os.path.lexists(link) and not link.is_symlink():
        raise FileExistsError(errno.EEXIST, "is in the way: it exists and is not a symbolic link", str(link))
    temporary = link.with_name(f".{link.name}-{tag}")
    with contextlib.suppress(FileNotFoundError):  # left by a run that ended between the two steps below
        temporary.unlink()
    temporary.symlink_to(target_name)
    try:
        temporary.replace(link)
    except OSError:
        temporary.unlink()
        raise
    fsync_dir(link.parent)


def retire(directory: Path, retired: Path) -> None:
    """Delete a directory so that no reader sees half of it: rename it away, make that durable, then remove it."""
    directory.rename(retired)
    fsync_dir(retired.parent)
    remove_tree(retired)


def remove_tree(directory: Path) -> None:
    """Remove a directory and what is in it; one that is not there is fine. Follows no links. Raises OSError."""
    if os.path.lexists(directory):
        shutil.rmtree(directory)
