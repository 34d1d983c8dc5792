"""Arenas, plans and attempt directories for the writer's tests: made up, but written by the real thing."""

from __future__ import annotations

import mmap
import os
import random
import select
from pathlib import Path

from awscrt.checksums import crc64nvme
from hypothesis import strategies as st

from stillframe.records import Extent, FileReceipt, FileShare, InlineFile, Receipt, WritePlan, WriteRequest

PAGE_BYTES = 4096
MARKER = ".stillframe/attempt-0a1b"


class SharedArena:
    """A memfd with content, as the trainer would hold it."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.fd = os.memfd_create("test-arena", os.MFD_CLOEXEC)
        if content:
            os.ftruncate(self.fd, len(content))
            self.map: mmap.mmap | None = mmap.mmap(self.fd, len(content))
            self.map[:] = bytes(content)
            self.view = memoryview(self.map)
        else:
            self.map = None
            self.view = memoryview(b"")

    def close(self) -> None:
        self.view.release()
        if self.map is not None:
            self.map.close()
        os.close(self.fd)

    def __enter__(self) -> SharedArena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Scenario:
    """Files whose content is known, cut into extents that are spread over ranks with arenas of their own."""

    def __init__(self, contents: dict[str, bytes], plans: list[WritePlan], arenas: list[bytearray]) -> None:
        self.contents = contents
        self.plans = plans
        self.arenas = arenas


@st.composite
def scenarios(draw: st.DrawFn, *, ranks: int) -> Scenario:
    """Layouts as odd as can be: unaligned and empty extents, and runs large enough for direct I/O, in turns."""
    source = random.Random(draw(st.integers(0, 2**32)))
    arenas = [bytearray() for _ in range(ranks)]
    shares: list[list[FileShare]] = [[] for _ in range(ranks)]
    contents = {}
    for number in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(["{}.safetensors", "sub/{}.bin"])).format(number)
        size_bytes = draw(st.integers(0, 3 * PAGE_BYTES) | st.integers(3 << 20, 5 << 20))
        content = contents[name] = source.randbytes(size_bytes)
        cuts = sorted(draw(st.lists(st.integers(0, size_bytes), max_size=6)))
        extents: list[list[Extent]] = [[] for _ in range(ranks)]
        for start, stop in zip([0, *cuts], [*cuts, size_bytes], strict=True):
            rank = draw(st.integers(0, ranks - 1))
            arena = arenas[rank]
            arena.extend(bytes(_padding(len(arena), start, draw(st.sampled_from(["congruent", "tight", "odd"])))))
            extents[rank].append(Extent(file_offset=start, arena_offset=len(arena), length_bytes=stop - start))
            arena.extend(content[start:stop])
        for rank in range(ranks):
            shares[rank].append(FileShare(name=name, size_bytes=size_bytes, extents=tuple(extents[rank])))
    plans = [
        WritePlan(
            plan_id=draw(st.integers(0, 99)),
            rank=rank,
            world_size=ranks,
            layout_digest="digest",
            arena_bytes=len(arenas[rank]),
            files=tuple(shares[rank]),
        )
        for rank in range(ranks)
    ]
    return Scenario(contents, plans, arenas)


def _padding(arena_bytes: int, file_offset: int, kind: str) -> int:
    to_congruent = (file_offset - arena_bytes) % PAGE_BYTES
    return {"tight": 0, "congruent": to_congruent, "odd": to_congruent + 1}[kind]


def whole_file_plan(contents: dict[str, bytes], *, plan_id: int = 1) -> tuple[WritePlan, bytes]:
    """One rank that owns all of some files, and its arena's content."""
    arena = bytearray()
    files = []
    for name, content in contents.items():
        arena.extend(bytes(-len(arena) % PAGE_BYTES))
        extent = Extent(file_offset=0, arena_offset=len(arena), length_bytes=len(content))
        files.append(FileShare(name=name, size_bytes=len(content), extents=(extent,)))
        arena.extend(content)
    plan = WritePlan(
        plan_id=plan_id, rank=0, world_size=1, layout_digest="digest", arena_bytes=len(arena), files=tuple(files)
    )
    return plan, bytes(arena)


def make_attempt_dir(directory: Path) -> Path:
    """An incomplete directory as rank 0 prepares it."""
    (directory / MARKER).parent.mkdir(parents=True)
    (directory / MARKER).touch()
    return directory


def make_request(directory: Path, plan: WritePlan, inline_files: dict[str, bytes] | None = None) -> WriteRequest:
    return WriteRequest(
        plan_id=plan.plan_id,
        kind="hf",
        step=100,
        attempt="0a1b",
        directory=directory,
        marker_name=MARKER,
        receipt_name=receipt_name(plan.rank),
        inline_files=tuple(InlineFile(name=name, content=content) for name, content in (inline_files or {}).items()),
    )


def receipt_name(rank: int) -> str:
    return f".stillframe/receipt-{rank:05d}.json"


def check_receipt(receipt: Receipt, plan: WritePlan, contents: dict[str, bytes]) -> None:
    """The receipt states all of the plan's extents and each inline file, with the CRCs of what `contents` says."""
    stated = {file.name: file for file in receipt.files}
    assert len(stated) == len(receipt.files)
    for share in plan.files:
        found = [(extent.file_offset, extent.length_bytes) for extent in stated[share.name].extents]
        assert found == [(extent.file_offset, extent.length_bytes) for extent in share.extents]
    for inline_name in stated.keys() - {share.name for share in plan.files}:
        assert [extent.length_bytes for extent in stated[inline_name].extents] == [len(contents[inline_name])]
    for file in receipt.files:
        check_file_receipt(file, contents[file.name])
    assert receipt.bytes_written == sum(extent.length_bytes for file in receipt.files for extent in file.extents)


def check_file_receipt(file: FileReceipt, content: bytes) -> None:
    assert file.size_bytes == len(content)
    for extent in file.extents:
        assert extent.crc64nvme == crc64nvme(content[extent.file_offset : extent.file_offset + extent.length_bytes])


def wait_for_exit(pidfd: int, timeout_s: float = 60.0) -> None:
    """Wait until a process, maybe not our child, has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    assert poller.poll(timeout_s * 1000), "the process still runs"


def count_own_descriptors() -> int:
    """How many descriptors this process has open; counting uses one more, each time."""
    return len(list(Path("/proc/self/fd").iterdir()))
