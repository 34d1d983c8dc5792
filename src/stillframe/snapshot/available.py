"""How much memory this process can have: what the host has left, and what the limits of its control groups leave.

Sources: proc_meminfo(5), cgroups(7), proc_pid_mountinfo(5), and the kernel's cgroup-v2 and cgroup-v1/memory
documents. Containers and batch systems set such limits; whoever exceeds one is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stillframe.errors import StillframeError

_UNLIMITED_FROM_BYTES = 1 << 60  # cgroup v1 says "no limit" by a number near 2^63


@dataclass(frozen=True, slots=True, kw_only=True)
class Available:
    """`size_bytes` can be had without swapping; `where` says what leaves no more."""

    size_bytes: int
    where: str


class _Names(NamedTuple):
    """A control group's files, by the version of the interface."""

    limit: str
    usage: str
    reclaimable: tuple[str, ...]


_V2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available_memory(proc_dir: Path = Path("/proc")) -> Available:
    """The least of what host and control groups leave now. Raises StillframeError if the host does not say."""
    return min([_host(proc_dir), *_groups(proc_dir / "self")], key=lambda found: found.size_bytes)


def _host(proc_dir: Path) -> Available:
    for line in (proc_dir / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return Available(size_bytes=int(line.split()[1]) * 1024, where="on this host")
    raise StillframeError(f"{proc_dir / 'meminfo'} does not say how much memory is available")


def _groups(process_dir: Path) -> Iterator[Available]:
    """What each of the process's memory groups leaves, from its own up to the outermost that can be seen."""
    for group_dir, mount_dir, names in _own_groups(process_dir):
        for directory in (group_dir, *group_dir.parents):
            found = _left(directory, names)
            if found is not None:
                yield found
            if directory == mount_dir:
                break


def _own_groups(process_dir: Path) -> Iterator[tuple[Path, Path, _Names]]:
    """The process's memory groups: `(its directory, where the hierarchy is mounted, names)`."""
    try:
        memberships = (process_dir / "cgroup").read_text().splitlines()
        mounts = (process_dir / "mountinfo").read_text().splitlines()
    except OSError:  # a kernel without control groups has no limits of theirs
        return
    for line in memberships:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            names, kind = _V2, "cgroup2"
        elif "memory" in controllers.split(","):
            names, kind = _V1, "cgroup"
        else:
            continue
        for mount in mounts:
            fields, _, extra = mount.partition(" - ")
            fs_type, _, options = extra.split(" ", 2)
            root, mount_point = fields.split(" ")[3:5]
            if fs_type != kind or (names is _V1 and "memory" not in options.split(",")):
                continue
            mount_dir = Path(mount_point)
            # In a container only a part of the hierarchy may be mounted, and the path may lead out of it.
            inside = path.removeprefix(root) if root != "/" else path
            group_dir = mount_dir / inside.lstrip("/")
            yield (group_dir if ".." not in group_dir.parts and group_dir.is_dir() else mount_dir), mount_dir, names


def _left(directory: Path, names: _Names) -> Available | None:
    """What the limit of one group leaves; None for a group without one, such as the outermost."""
    try:
        limit = (directory / names.limit).read_text().strip()
        if limit == "max" or int(limit) >= _UNLIMITED_FROM_BYTES:
            return None
        used = int((directory / names.usage).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    # Cached files are counted as used, and given up when memory is short; the cache of shared memory is not among them.
    cached = sum(int(stat.get(name, 0)) for name in names.reclaimable)
    left = max(0, int(limit) - max(0, used - cached))
    return Available(size_bytes=left, where=f"within the memory limit of its control group {directory}")
