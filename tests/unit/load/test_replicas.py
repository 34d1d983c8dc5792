"""Who reads what of what several ranks hold alike: every element once, in buckets of bounded size, and evenly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stillframe
from stillframe.errors import OptionError
from stillframe.layout.runs import Runs
from stillframe.load.computing import Filler
from stillframe.load.keys import LoadKeys
from stillframe.load.matching import Target
from stillframe.load.reading import Reader
from stillframe.load.replicas import share_out
from stillframe.load.sources import Computed, Conversion, Source
from stillframe.testing.models import tiny_qwen3

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8)


def _part(name: str, size: int, source: int, dtype: torch.dtype = torch.float32) -> tuple[Target, Runs]:
    runs = Runs.of([(0, source, 0, size)])
    return Target(name=name, tensor=torch.empty(size, dtype=dtype, device="meta"), runs=runs, same_as={}), runs


def _filler(stored: int, *computed: Computed) -> Filler:
    keys = LoadKeys(
        sources=tuple(Source(key=str(n)) for n in range(stored)), computed=computed, tensors={}, unexpected={}, unfit={}
    )
    return Filler(Reader([], ()), keys)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 100_000), st.sampled_from(DTYPES)), min_size=1, max_size=20),
    replica_count=st.integers(2, 9),
    bucket_bytes=st.integers(16, 1 << 20),
)
def test_every_element_is_read_by_one_rank_and_all_read_about_as_much(
    sizes: list[tuple[int, torch.dtype]], replica_count: int, bucket_bytes: int
) -> None:
    parts = [_part(str(n), size, n, dtype) for n, (size, dtype) in enumerate(sizes)]
    replicas = tuple(range(3, 3 + replica_count))
    alike = share_out(replicas, parts, _filler(len(sizes)), bucket_bytes=bucket_bytes)
    position = dict.fromkeys(range(len(sizes)), 0)
    load = dict.fromkeys(replicas, 0)
    for bucket in alike.buckets:
        end = 0
        for piece in bucket.pieces:
            assert piece.begin >= end
            assert piece.begin % 16 == 0
            assert piece.dtype == sizes[piece.part][1]
            assert piece.first == position[piece.part], "in order"
            assert piece.count > 0
            position[piece.part] += piece.count
            end = piece.begin + piece.count * piece.dtype.itemsize
        assert end == bucket.size_bytes <= bucket_bytes
        load[bucket.reader] += bucket.size_bytes
    assert position == {n: size for n, (size, _) in enumerate(sizes)}
    assert max(load.values()) - min(load.values()) <= max(bucket.size_bytes for bucket in alike.buckets)
    assert alike.digest() == share_out(replicas, parts, _filler(len(sizes)), bucket_bytes=bucket_bytes).digest()


def test_what_is_computed_together_is_read_by_one_rank_whatever_its_size() -> None:
    conversions = [Conversion(sources=(n,), shapes=((1000,),), dtype=torch.float32, run=lambda _: {}) for n in range(2)]
    computed = [Computed(name=str(n), shape=(500,), conversion=conversions[n // 2]) for n in range(4)]
    parts = [*(_part(str(n), 500, 2 + n) for n in range(4)), _part("stored", 8000, 1)]
    alike = share_out((0, 1, 2), parts, _filler(2, *computed), bucket_bytes=1024)
    readers = [{b.reader for b in alike.buckets for p in b.pieces if p.part == number} for number in range(5)]
    assert readers[0] == readers[1] != readers[2] == readers[3]
    assert len(readers[0]) == len(readers[2]) == 1
    assert len(readers[4]) == 3
    assert all(bucket.size_bytes <= 1024 for bucket in alike.buckets)


def test_a_job_of_one_has_nobody_to_share_with(tmp_path: Path) -> None:
    tiny_qwen3(seed=1).save_pretrained(tmp_path)
    model = tiny_qwen3(seed=2)
    report = stillframe.load_hf(tmp_path, model, broadcast=True)
    assert report.bytes_read == sum(parameter.nbytes for parameter in model.parameters())
    for found, expected in zip(model.parameters(), tiny_qwen3(seed=1).parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"broadcast": "yes"}, "broadcast must be True or False, not 'yes'"),
        ({"broadcast": True, "pipeline": True}, "leave out one of pipeline and broadcast"),
        ({"broadcast": True, "timeout_s": 0}, "timeout_s must be a number of seconds above 0"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        stillframe.load_hf(tmp_path, tiny_qwen3(), **options)  # type: ignore[arg-type]
