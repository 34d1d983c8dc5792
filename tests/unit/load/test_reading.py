"""Runs of stored tensors into memory: every element at its place, no byte read that was not asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from stillframe.errors import CorruptCheckpoint, LoadError
from stillframe.layout.runs import Runs
from stillframe.load.directory import WEIGHTS_NAME, WeightFile, open_weights
from stillframe.load.reading import Reader, left_to_read
from stillframe.load.sources import Permutation, Source

# Neighbours in the file in this order: safetensors sorts by dtype, then by name.
STORED = {
    "wide": torch.arange(100, dtype=torch.float64),
    "a": torch.arange(1000.0, 1060.0),
    "b": torch.arange(2000.0, 2040.0),
    "half": torch.arange(64, dtype=torch.bfloat16),
    "matrix": torch.arange(60, dtype=torch.int16).reshape(3, 4, 5),
    "bytes": torch.arange(7, dtype=torch.uint8),
}
FLOATING = ("wide", "a", "b", "half")


@contextmanager
def stored(directory: Path) -> Iterator[tuple[WeightFile, ...]]:
    save_file(STORED, directory / WEIGHTS_NAME)
    with open_weights(directory) as files:
        yield files


def sources(*names: str) -> list[Source]:
    return [Source(key=name) for name in names]


def expected(names: tuple[str, ...], rows: list[tuple[int, int, int, int]], into: torch.Tensor) -> torch.Tensor:
    into = into.clone()
    for start, source, source_start, length in rows:
        into[start : start + length].copy_(STORED[names[source]].reshape(-1)[source_start : source_start + length])
    return into


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WeightFile, ...]]:
    with stored(tmp_path_factory.mktemp("stored")) as files:
        yield files


@st.composite
def scattered_runs(draw: st.DrawFn) -> tuple[list[tuple[int, int, int, int]], int]:
    """Runs from any place of any floating tensor to places of their own, in any order; and the size that they need."""
    rows, position = [], 0
    for source in draw(st.lists(st.integers(0, len(FLOATING) - 1), max_size=12)):
        size = STORED[FLOATING[source]].numel()
        source_start = draw(st.integers(0, size - 1))
        length = draw(st.integers(1, size - source_start))
        position += draw(st.integers(0, 2))
        rows.append((position, source, source_start, length))
        position += length
    return draw(st.permutations(rows)), position + 1


@given(
    drawn=scattered_runs(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    bounce_bytes=st.integers(8, 300),
    max_read_bytes=st.integers(1, 300),
)
def test_every_element_lands_in_its_place_and_nothing_else_changes(
    files: tuple[WeightFile, ...],
    drawn: tuple[list[tuple[int, int, int, int]], int],
    dtype: torch.dtype,
    bounce_bytes: int,
    max_read_bytes: int,
) -> None:
    rows, size = drawn
    flat = torch.full((size,), -1.0, dtype=dtype)
    wanted = expected(FLOATING, rows, flat)
    reader = Reader(files, sources(*FLOATING), bounce_bytes=bounce_bytes, max_read_bytes=max_read_bytes)
    reader.fill(flat, Runs.of(rows))
    assert torch.equal(flat, wanted)
    assert reader.bytes_read == sum(length * STORED[FLOATING[s]].dtype.itemsize for _, s, _, length in rows)


def test_a_stretch_with_more_places_than_one_call_can_fill(tmp_path: Path) -> None:
    values = torch.arange(3000.0)
    save_file({"values": values}, tmp_path / WEIGHTS_NAME)
    flat = torch.zeros(3000)
    backwards = Runs.of([(2999 - i, 0, i, 1) for i in range(3000)])
    with open_weights(tmp_path) as opened:
        Reader(opened, sources("values")).fill(flat, backwards)
    assert torch.equal(flat, values.flip(0))


def test_neighbours_in_the_file_of_different_dtypes_are_told_apart(files: tuple[WeightFile, ...]) -> None:
    rows = [(0, 0, 90, 10), (10, 1, 0, 60), (70, 2, 0, 40), (110, 3, 0, 64)]
    flat = torch.zeros(174)
    Reader(files, sources(*FLOATING)).fill(flat, Runs.of(rows))
    assert torch.equal(flat, expected(FLOATING, rows, torch.zeros(174)))


def test_runs_that_alternate_between_files_are_read_in_one_go_from_each(tmp_path: Path) -> None:
    size = 1000
    names = ("model-1.safetensors", "model-2.safetensors")
    for index, name in enumerate(names):
        save_file({f"t{index}": torch.arange(size) * 2 + index}, tmp_path / name)
    weight_map = {"t0": names[0], "t1": names[1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    flat = torch.zeros(2 * size, dtype=torch.int64)
    runs = Runs.of([(2 * i + s, s, i, 1) for i in range(size) for s in range(2)])
    with open_weights(tmp_path) as opened:
        reader = Reader(opened, sources("t0", "t1"))
        before = _calls_to_read()
        reader.fill(flat, runs)
        calls = _calls_to_read() - before
    assert flat.tolist() == list(range(2 * size))
    assert 2 <= calls < 20, "two, and those that read the counter"


def _calls_to_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["syscr"])


@given(st.lists(st.binary(max_size=5), max_size=6), st.data())
def test_what_a_short_read_left_is_everything_behind_what_it_got(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    got = data.draw(st.integers(0, len(whole)))
    left = left_to_read([memoryview(part) for part in parts], got)
    assert b"".join(left) == whole[got:]


def permuted(key: str, order: tuple[int, ...]) -> tuple[Source, torch.Tensor]:
    view = STORED[key].permute(order)
    shape, stride = tuple(view.shape), tuple(view.stride())
    return Source(key=key, permutation=Permutation(offset=0, shape=shape, stride=stride)), view.reshape(-1)


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 1, 0), (1, 2, 0), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
@pytest.mark.parametrize("low", [0, 1, 19, 21, 45])
def test_a_permuted_tensor_is_read_in_its_new_order(
    files: tuple[WeightFile, ...], order: tuple[int, ...], dtype: torch.dtype, low: int
) -> None:
    source, values = permuted("matrix", order)
    flat = torch.full((62,), -1, dtype=dtype)
    wanted = flat.clone()
    wanted[1 : 1 + 60 - low] = values[low:]
    Reader(files, [source]).fill(flat, Runs.of([(1, 0, low, 60 - low)]))
    assert torch.equal(flat, wanted)


def test_of_a_tensor_whose_inner_dimensions_are_swapped_only_the_wanted_slices_are_read(
    files: tuple[WeightFile, ...],
) -> None:
    source, values = permuted("matrix", (0, 2, 1))
    flat = torch.zeros(20, dtype=torch.int16)
    reader = Reader(files, [source])
    reader.fill(flat, Runs.of([(0, 0, 20, 20)]))
    assert torch.equal(flat, values[20:40])
    assert reader.bytes_read == 20 * 2


def test_a_view_with_gaps_is_read_with_its_gaps_left_out(files: tuple[WeightFile, ...]) -> None:
    every_other = Permutation(offset=1, shape=(3, 2), stride=(20, 2))
    flat = torch.zeros(6, dtype=torch.int16)
    reader = Reader(files, [Source(key="matrix", permutation=every_other)])
    reader.fill(flat, Runs.of([(0, 0, 0, 6)]))
    assert flat.tolist() == [1, 3, 21, 23, 41, 43]
    assert reader.bytes_read == 3 * 3 * 2, "a row from its first element to its last, in one piece"


def test_nothing_to_read_reads_nothing(files: tuple[WeightFile, ...]) -> None:
    reader = Reader(files, sources("a"))
    reader.fill(torch.empty(0), Runs.of([]))
    assert reader.bytes_read == 0


def test_a_file_cut_short_after_it_was_opened_is_an_error_with_the_place(tmp_path: Path) -> None:
    with stored(tmp_path) as opened:
        reader = Reader(opened, sources("bytes", "a"))
        os.truncate(tmp_path / WEIGHTS_NAME, opened[0].size_bytes - 3)
        flat = torch.zeros(7, dtype=torch.uint8)
        with pytest.raises(CorruptCheckpoint, match=rf"ended at byte {opened[0].size_bytes - 3} \(of 'bytes'\) while"):
            reader.fill(flat, Runs.of([(0, 0, 0, 7)]))
        values = torch.zeros(60)
        reader.fill(values, Runs.of([(0, 1, 0, 60)]))
        assert torch.equal(values, STORED["a"])


def test_an_error_of_the_file_system_is_raised_with_the_place(tmp_path: Path) -> None:
    with stored(tmp_path) as (file,):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        try:
            broken = WeightFile(path=file.path, descriptor=descriptor, size_bytes=file.size_bytes, tensors=file.tensors)
            said = rf"{WEIGHTS_NAME}: cannot read 240 bytes from byte \d+ \(of 'a'\): .*directory"
            with pytest.raises(LoadError, match=said):
                Reader([broken], sources("a")).fill(torch.zeros(60), Runs.of([(0, 0, 0, 60)]))
        finally:
            os.close(descriptor)
