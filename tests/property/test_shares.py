"""Whatever the files and however tensors are spread: together the ranks write every byte once, and the right one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stillframe.layout.placement import Holding
from stillframe.layout.runs import Runs
from stillframe.layout.shares import PlacedItem, rank_share
from stillframe.records import FileLayout, Item, Layout

WORLD_SIZES = st.integers(1, 6)


@st.composite
def spread_files(draw: st.DrawFn) -> tuple[Layout, list[PlacedItem], list[str], list[dict[str, Holding]], list[bytes]]:
    """A layout, its items, the sources, every rank's holdings, and what each file must contain."""
    world_size = draw(WORLD_SIZES)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(0, 300), min_size=1, max_size=5))
    element_bytes = draw(st.sampled_from([1, 2, 4, 8]))
    if draw(st.booleans()):  # one tensor large enough for pages and direct I/O
        sizes.append(draw(st.integers(1 << 18, 1 << 20)))
    names = [f"source{i}" for i in range(len(sizes))]
    data = [random.integers(0, 256, size * element_bytes, dtype=np.uint8).tobytes() for size in sizes]
    holdings: list[dict[str, Holding]] = [{} for _ in range(world_size)]
    for name, size in zip(names, sizes, strict=True):
        for rank, held in enumerate(_spread(draw, size, world_size)):
            holdings[rank][name] = held
    # Cut every source at random, shuffle the pieces into keys and the keys into files.
    pieces = [(s, a, b) for s, size in enumerate(sizes) for a, b in _cuts(draw, size)]
    order = random.permutation(len(pieces))
    keys = [[pieces[i] for i in order[k : k + 2]] for k in range(0, len(order), 2)]
    files_of_keys = [keys[k : k + 3] for k in range(0, len(keys), 3)]
    items, layouts, contents = [], [], []
    for index, file_keys in enumerate(files_of_keys):
        header = bytes(random.integers(0, 256, draw(st.integers(0, 20)) * 8, dtype=np.uint8))
        items.append(PlacedItem(file=index, file_offset=0, length_bytes=len(header), content=header))
        listed, content = [Item(name="", file_offset=0, length_bytes=len(header))], header
        for k, key in enumerate(file_keys):
            rows, position = [], 0
            for s, a, b in key:
                if b > a:
                    rows.append((position, s, a, b - a))
                position += b - a
            length = position * element_bytes
            items.append(
                PlacedItem(
                    file=index,
                    file_offset=len(content),
                    length_bytes=length,
                    runs=Runs.of(rows),
                    element_bytes=element_bytes,
                )
            )
            listed.append(Item(name=f"key{index}.{k}", file_offset=len(content), length_bytes=length))
            content += b"".join(data[s][a * element_bytes : b * element_bytes] for s, a, b in key)
        layouts.append(FileLayout(name=f"file{index}", size_bytes=len(content), items=tuple(listed)))
        contents.append(content)
    layout = Layout(
        format="hf",
        world_size=world_size,
        files=tuple(layouts),
        inline_files=(),
        total_bytes=sum(map(len, contents)),
        digest="d",
    )
    return layout, items, names, holdings, [*contents, *data]


def _cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    borders = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
    return list(pairwise(borders)) or [(0, 0)]


def _spread(draw: st.DrawFn, size: int, world_size: int) -> list[Holding]:
    """Contiguous shards over groups of ranks, each held alike by all ranks of its group; some groups hold nothing."""
    ranks = draw(st.permutations(range(world_size)))
    groups_count = draw(st.integers(1, world_size))
    groups = [tuple(sorted(ranks[g::groups_count])) for g in range(groups_count)]
    borders = [0, *sorted(draw(st.lists(st.integers(0, size), min_size=groups_count - 1, max_size=groups_count - 1)))]
    borders.append(size)
    holdings: list[Holding | None] = [None] * world_size
    for group, begin, end in zip(groups, borders[:-1], borders[1:], strict=True):
        runs = Runs.of([(begin, 0, 0, end - begin)] if end > begin else [])
        for rank in group:
            holdings[rank] = Holding(runs=runs, replicas=group, signature="")
    return [held for held in holdings if held is not None]


def _local_bytes(holding: Holding, data: bytes, element_bytes: int) -> bytes:
    return b"".join(
        data[start * element_bytes : (start + length) * element_bytes]
        for start, length in zip(holding.runs.start, holding.runs.length, strict=True)
    )


@given(spread_files())
def test_every_byte_of_every_file_is_written_once_and_right(
    case: tuple[Layout, list[PlacedItem], list[str], list[dict[str, Holding]], list[bytes]],
) -> None:
    layout, items, names, holdings, blobs = case
    contents, data = blobs[: len(layout.files)], dict(zip(names, blobs[len(layout.files) :], strict=True))
    element_bytes = next((item.element_bytes for item in items if item.runs is not None), 1)
    written = [np.zeros(file.size_bytes, dtype=np.int64) for file in layout.files]
    results = [bytearray(file.size_bytes) for file in layout.files]
    position_of = {file.name: index for index, file in enumerate(layout.files)}
    for rank in range(layout.world_size):
        share = rank_share(layout, items, names, holdings[rank], rank=rank, plan_id=1)
        arena, used = bytearray(share.plan.arena_bytes), np.zeros(share.plan.arena_bytes, dtype=np.int64)
        for copy in share.copies:
            local = _local_bytes(holdings[rank][copy.tensor], data[copy.tensor], element_bytes)
            length = copy.element_count * element_bytes
            part = local[copy.first_element * element_bytes :][:length]
            assert len(part) == length
            arena[copy.arena_offset : copy.arena_offset + length] = part
            used[copy.arena_offset : copy.arena_offset + length] += 1
        for envelope in share.envelopes:
            arena[envelope.arena_offset : envelope.arena_offset + len(envelope.content)] = envelope.content
            used[envelope.arena_offset : envelope.arena_offset + len(envelope.content)] += 1
        assert used.max(initial=0) <= 1
        for file_share in share.plan.files:
            index = position_of[file_share.name]
            borders = {item.file_offset for item in layout.files[index].items}
            for extent in file_share.extents:
                begin, end = extent.file_offset, extent.file_offset + extent.length_bytes
                assert not any(begin < border < end for border in borders)
                if extent.length_bytes >= 1 << 20:
                    assert (extent.arena_offset - begin) % 4096 == 0
                results[index][begin:end] = arena[extent.arena_offset : extent.arena_offset + extent.length_bytes]
                written[index][begin:end] += 1
    assert all((counts == 1).all() for counts in written)
    assert [bytes(result) for result in results] == contents


@given(st.integers(1, 8), st.lists(st.integers(1, 5000), min_size=1, max_size=30))
def test_what_all_hold_alike_is_split_fairly(world_size: int, lengths: list[int]) -> None:
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    items = [
        PlacedItem(file=0, file_offset=int(start), length_bytes=length, runs=Runs.of([(0, i, 0, length)]))
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    names = [f"source{i}" for i in range(len(lengths))]
    everyone = tuple(range(world_size))
    holdings = {
        name: Holding(runs=Runs.of([(0, 0, 0, length)]), replicas=everyone, signature="")
        for name, length in zip(names, lengths, strict=True)
    }
    listed = tuple(Item(name="key", file_offset=i.file_offset, length_bytes=i.length_bytes) for i in items)
    file = FileLayout(name="f", size_bytes=total, items=listed)
    layout = Layout(format="hf", world_size=world_size, files=(file,), inline_files=(), total_bytes=total, digest="d")
    shares = [rank_share(layout, items, names, holdings, rank=rank, plan_id=1) for rank in everyone]
    staged = [sum(copy.element_count for copy in share.copies) for share in shares]
    assert sum(staged) == total
    assert max(staged) - min(staged) <= 2 * 64  # cuts fall on multiples of 64 bytes
