"""How much memory can be had: the host's, within the limits of control groups, as containers have them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.errors import StillframeError
from stillframe.snapshot.available import available_memory

GIB = 1 << 30


@pytest.fixture
def proc_dir(tmp_path: Path) -> Path:
    """A host with 8 GiB left whose processes are in no control group."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal:  99 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    return tmp_path / "proc"


def v2_group(directory: Path, *, limit: str, used: int, inactive: int = 0, active: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file {active}\nshmem 5\n")


def member(proc_dir: Path, membership: str, mount: str) -> None:
    (proc_dir / "self/cgroup").write_text(f"9:name=systemd:/\n{membership}\n")
    (proc_dir / "self/mountinfo").write_text(f"31 23 0:28 / /elsewhere rw - tmpfs tmpfs rw\n{mount}\n")


def test_without_groups_it_is_the_host_s(proc_dir: Path) -> None:
    found = available_memory(proc_dir)
    assert (found.size_bytes, found.where) == (8 * GIB, "on this host")


def test_a_host_that_does_not_say(proc_dir: Path) -> None:
    (proc_dir / "meminfo").write_text("MemTotal: 1 kB\n")
    with pytest.raises(StillframeError, match="does not say how much memory is available"):
        available_memory(proc_dir)


@pytest.mark.parametrize(
    ("inner", "outer", "expected", "by"),
    [
        ("max", "max", 8 * GIB, None),
        (str(4 * GIB), "max", 4 * GIB - 1000, "job/task"),
        (str(4 * GIB), str(3 * GIB), 3 * GIB - 1000, "job"),
        (str(99 * GIB), "max", 8 * GIB, None),
        ("500", "max", 0, "job/task"),
    ],
)
def test_the_tightest_limit_counts(
    proc_dir: Path, tmp_path: Path, inner: str, outer: str, expected: int, by: str | None
) -> None:
    mount = tmp_path / "groups"
    v2_group(mount / "job", limit=outer, used=3000, inactive=1500, active=500)
    v2_group(mount / "job/task", limit=inner, used=3000, inactive=1500, active=500)
    member(proc_dir, "0::/job/task", f"32 31 0:29 / {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw")
    found = available_memory(proc_dir)
    assert found.size_bytes == expected
    assert found.where == (
        "on this host" if by is None else f"within the memory limit of its control group {mount / by}"
    )


def test_the_first_version_of_the_interface(proc_dir: Path, tmp_path: Path) -> None:
    mount = tmp_path / "memory"
    (mount / "box").mkdir(parents=True)
    (mount / "box/memory.limit_in_bytes").write_text("1000000\n")
    (mount / "box/memory.usage_in_bytes").write_text("700000\n")
    (mount / "box/memory.stat").write_text("inactive_file 1\ntotal_inactive_file 200000\ntotal_active_file 50000\n")
    (mount / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")  # none
    member(proc_dir, "4:hugetlb,memory:/box", f"36 31 0:33 / {mount} rw - cgroup cgroup rw,memory")
    assert available_memory(proc_dir).size_bytes == 1000000 - (700000 - 250000)


@pytest.mark.parametrize("path", ["/docker/0123", "/../../outside"])
def test_in_a_container_that_sees_only_its_own_part(proc_dir: Path, tmp_path: Path, path: str) -> None:
    mount = tmp_path / "groups"
    v2_group(mount, limit="5000", used=1000)
    member(proc_dir, f"0::{path}", f"32 31 0:29 /docker/0123 {mount} ro - cgroup2 cgroup rw")
    assert available_memory(proc_dir).size_bytes == 4000


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A real control group of at most 256 MiB."""
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / f"stillframe-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(256 << 20))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("control groups for memory cannot be made here (needs root and a writable /sys/fs/cgroup)")


def test_a_real_limit_is_respected_instead_of_hit(small_group: Path) -> None:
    """Without looking at it, the arena would be populated until the kernel kills the process."""
    program = (
        "import os, pathlib, sys\n"
        "(pathlib.Path(sys.argv[1]) / 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from stillframe.snapshot.arena import Arena\n"
        "from stillframe.errors import StillframeError\n"
        "Arena(1 << 20).close()\n"
        "try:\n"
        "    Arena(512 << 20)\n"
        "except StillframeError as error:\n"
        "    print(error)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(small_group)], capture_output=True, text=True, timeout=120, check=True
    )
    assert f"are available within the memory limit of its control group {small_group}" in finished.stdout
    assert "cannot allocate 536870912 bytes" in finished.stdout
