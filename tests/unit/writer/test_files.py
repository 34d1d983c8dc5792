from __future__ import annotations

import errno
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from awscrt.checksums import crc64nvme
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.records import Extent, FileReceipt, FileShare
from stillframe.writer.blocks import FileBlocks, cut_blocks
from stillframe.writer.directory import FileWriteError, OpenDirectory
from stillframe.writer.files import Stopped, WriteMethod, _preallocate, write_files
from tests.unit.writer.saves import (
    Scenario,
    SharedArena,
    check_file_receipt,
    count_own_descriptors,
    scenarios,
    whole_file_plan,
)

METHODS = {
    "defaults": WriteMethod(),
    "buffered": WriteMethod(direct=False),
    "unallocated": WriteMethod(preallocate=False),
    "buffered, unallocated": WriteMethod(direct=False, preallocate=False),
    "one thread": WriteMethod(threads=1),
    "many threads": WriteMethod(threads=5),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def write(
    directory: Path,
    arena: memoryview,
    files: list[FileBlocks],
    *,
    method: WriteMethod | None = None,
    stop: threading.Event | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[FileReceipt, ...]:
    with OpenDirectory(directory) as opened:
        return write_files(opened, arena, files, stop=stop or threading.Event(), on_progress=on_progress, method=method)


def cut_whole_files(contents: dict[str, bytes], block_bytes: int = 1 << 20) -> tuple[list[FileBlocks], bytes]:
    plan, arena = whole_file_plan(contents)
    return [cut_blocks(share, arena_bytes=len(arena), block_bytes=block_bytes) for share in plan.files], arena


def write_scenario(scenario: Scenario, directory: Path, method: WriteMethod, block_bytes: int) -> None:
    """All ranks at once, each from an arena of its own, into the same files."""
    arenas = [SharedArena(content) for content in scenario.arenas]
    done_bytes = [[0] for _ in scenario.plans]

    def write_rank(rank: int) -> tuple[FileReceipt, ...]:
        plan = scenario.plans[rank]
        files = [cut_blocks(share, arena_bytes=plan.arena_bytes, block_bytes=block_bytes) for share in plan.files]
        return write(directory, arenas[rank].view, files, method=method, on_progress=done_bytes[rank].append)

    with ThreadPoolExecutor(len(arenas)) as ranks:
        receipts = list(ranks.map(write_rank, range(len(arenas))))
    for arena in arenas:
        arena.close()
    for name, content in scenario.contents.items():
        assert (directory / name).read_bytes() == content
    for plan, files, progress in zip(scenario.plans, receipts, done_bytes, strict=True):
        assert [file.name for file in files] == [share.name for share in plan.files]
        for file in files:
            check_file_receipt(file, scenario.contents[file.name])
        assert sum(progress) == sum(extent.length_bytes for share in plan.files for extent in share.extents)


@pytest.fixture(params=["disk", "/dev/shm"])
def base_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(
        dir=tmp_path_factory.getbasetemp() if request.param == "disk" else "/dev/shm"
    ) as d:
        yield Path(d)


@methods
def test_any_layout_is_written_exactly(base_dir: Path, method: WriteMethod) -> None:
    @given(scenarios(ranks=3), st.sampled_from([1 << 16, 4 << 20]))
    @settings(max_examples=20, deadline=None)
    def check(scenario: Scenario, block_bytes: int) -> None:
        with tempfile.TemporaryDirectory(dir=base_dir) as directory:
            write_scenario(scenario, Path(directory), method, block_bytes)

    check()


def test_a_file_system_with_neither_direct_io_nor_preallocation(mount: Callable[[str, str], Path]) -> None:
    directory = mount("ramfs", "mode=755")
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    with (directory / "probe").open("wb") as probe:
        assert not _preallocate(probe.fileno(), 4096)
    content = os.urandom(3 << 20)
    files, arena = cut_whole_files({"f": content, "g": b"x"})
    assert any(block.direct for block in files[0].blocks)
    with SharedArena(arena) as shared:
        receipts = write(directory, shared.view, files)
    for receipt, expected in zip(receipts, (content, b"x"), strict=True):
        assert (directory / receipt.name).read_bytes() == expected
        check_file_receipt(receipt, expected)


def test_memory_that_direct_io_refuses_is_written_through_the_page_cache(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    files, arena = cut_whole_files({"f": content})
    assert any(block.direct for block in files[0].blocks)
    with SharedArena(b"\0" + arena) as shared, shared.view[1:] as askew:
        (receipt,) = write(tmp_path, askew, files)
    assert (tmp_path / "f").read_bytes() == content
    check_file_receipt(receipt, content)


def test_a_file_of_which_the_rank_owns_nothing_gets_its_size(tmp_path: Path) -> None:
    shares = [FileShare(name="f", size_bytes=0, extents=()), FileShare(name="g", size_bytes=7, extents=())]
    nothing = [cut_blocks(share, arena_bytes=0, block_bytes=4096) for share in shares]
    receipts = write(tmp_path, memoryview(b""), nothing)
    assert [(file.name, file.size_bytes, file.extents) for file in receipts] == [("f", 0, ()), ("g", 7, ())]
    assert [(tmp_path / name).stat().st_size for name in "fg"] == [0, 7]


def test_bytes_of_others_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xee" * 100)
    share = FileShare(name="f", size_bytes=100, extents=(Extent(file_offset=40, arena_offset=0, length_bytes=10),))
    write(tmp_path, memoryview(bytes(10)), [cut_blocks(share, arena_bytes=10, block_bytes=4096)])
    assert (tmp_path / "f").read_bytes() == b"\xee" * 40 + bytes(10) + b"\xee" * 50


def test_a_file_that_is_larger_than_it_may_be_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xee" * 101)
    files, arena = cut_whole_files({"f": bytes(100)})
    with pytest.raises(FileWriteError, match="'f' failed: it has 101 bytes already, more than the 100 to write"):
        write(tmp_path, memoryview(arena), files)
    assert (tmp_path / "f").read_bytes() == b"\xee" * 101


@pytest.mark.parametrize("preallocate", [True, False])
def test_a_full_disk_is_reported_with_file_and_place(mount: Callable[[str, str], Path], preallocate: bool) -> None:
    directory = mount("tmpfs", "size=2m")
    files, arena = cut_whole_files({"large": bytes(5 << 20)})
    with SharedArena(arena) as shared, pytest.raises(FileWriteError) as caught:
        write(directory, shared.view, files, method=WriteMethod(preallocate=preallocate))
    assert caught.value.errno == errno.ENOSPC
    what = f"allocating {5 << 20} bytes for" if preallocate else r"writing \d+ bytes at offset \d+ of"
    assert re.fullmatch(rf"{what} 'large' failed: No space left on device \(ENOSPC\)", str(caught.value))


def test_stopping_between_blocks(tmp_path: Path) -> None:
    stop = threading.Event()
    seen: list[int] = []

    def stop_after_two(length_bytes: int) -> None:
        seen.append(length_bytes)
        if len(seen) == 2:
            stop.set()

    files, arena = cut_whole_files({"f": bytes(1 << 20)}, block_bytes=1 << 16)
    with pytest.raises(Stopped):
        write(tmp_path, memoryview(arena), files, stop=stop, on_progress=stop_after_two, method=WriteMethod(threads=1))
    assert seen == [1 << 16] * 2


@methods
def test_no_descriptor_and_no_thread_is_left(tmp_path: Path, method: WriteMethod) -> None:
    before = (count_own_descriptors(), threading.active_count())
    files, arena = cut_whole_files({"a": os.urandom(2 << 20), "b": b"1"})
    with SharedArena(arena) as shared:
        write(tmp_path, shared.view, files, method=method)
        (tmp_path / "b").unlink()
        (tmp_path / "b").mkdir()
        with pytest.raises(FileWriteError, match="'b' failed: Is a directory"):
            write(tmp_path, shared.view, files, method=method)
    assert (count_own_descriptors(), threading.active_count()) == before


@pytest.mark.parametrize("direct", [False, True])
def test_files_are_open_for_writing_only(tmp_path: Path, direct: bool) -> None:
    """With a descriptor that could read, an NFS client reads and rewrites whole pages, which hold others' bytes too."""
    access: dict[str, set[int]] = {}

    def look(_: int) -> None:
        for link in Path("/proc/self/fd").iterdir():
            target = Path(os.path.realpath(link))
            if target.parent == tmp_path:
                flags = int(Path(f"/proc/self/fdinfo/{link.name}").read_text().split("flags:")[1].split()[0], 8)
                access.setdefault(target.name, set()).add(flags & os.O_ACCMODE)

    files, arena = cut_whole_files({"large": os.urandom(2 << 20), "small": b"1"})
    with SharedArena(arena) as shared:
        write(tmp_path, shared.view, files, method=WriteMethod(threads=1, direct=direct), on_progress=look)
    assert access == {"large": {os.O_WRONLY}, "small": {os.O_WRONLY}}


def test_the_checksum_is_the_published_one() -> None:
    assert crc64nvme(b"123456789") == 0xAE8B14860A799888
