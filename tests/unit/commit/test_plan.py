"""The plan of an attempt: read back as it was written, and refused whole if it is anything else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stillframe.commit.plan import AttemptPlan, decode_plan, encode_plan
from stillframe.manifest import FileEntry
from stillframe.records import FileLayout, Item, Layout

texts = st.text(st.characters(exclude_categories=["Cs"]))
parts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1).filter(
    lambda part: part not in (".", "..", ".stillframe", "stillframe.json")
)
file_names = st.lists(parts, min_size=1, max_size=3).map("/".join)
counts = st.integers(0, 2**63)
entries = st.builds(FileEntry, size=counts, crc64nvme=st.integers(0, 2**64 - 1).map("{:016x}".format))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    files = []
    for name in draw(st.lists(file_names, max_size=3)):
        items, position = [], 0
        for item, length in draw(st.lists(st.tuples(texts, counts), max_size=4)):
            items.append(Item(name=item, file_offset=position, length_bytes=length))
            position += length
        files.append(FileLayout(name=name, size_bytes=position, items=tuple(items)))
    world_size = draw(st.integers(1, 3))
    rank_files = draw(st.lists(file_names, min_size=world_size, max_size=world_size) | st.just([]))
    return Layout(
        format=draw(texts),
        world_size=world_size,
        files=tuple(files),
        inline_files=(),
        total_bytes=sum(file.size_bytes for file in files),
        digest=draw(texts),
        rank_files=tuple(rank_files),
        held_back=tuple(draw(st.lists(file_names, max_size=2))),
    )


plans = st.builds(
    AttemptPlan,
    kind=texts,
    step=counts,
    attempt=texts,
    overwrite=st.booleans(),
    layout=layouts(),
    inline_files=st.dictionaries(file_names, entries, max_size=3),
    git_commit=st.none() | texts,
    versions=st.dictionaries(texts, texts, max_size=2),
    branch=texts,
    metrics=st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
)
PLAN = AttemptPlan(
    kind="checkpoint",
    step=5,
    attempt="0123456789abcdef.1",
    overwrite=True,
    layout=Layout(
        format="checkpoint",
        world_size=2,
        files=(
            FileLayout(
                name="__0_0.distcp",
                size_bytes=72,
                items=(
                    Item(name="", file_offset=0, length_bytes=8),
                    Item(name="a@0,0", file_offset=8, length_bytes=64),
                ),
            ),
        ),
        inline_files=(),
        total_bytes=72,
        digest="d" * 64,
        rank_files=("state/rank-00000.pt", "state/rank-00001.pt"),
        held_back=(".metadata",),
    ),
    inline_files={".metadata": FileEntry(size=3, crc64nvme="0" * 15 + "f")},
    git_commit=None,
    versions={"torch": "2.13.0"},
    branch="main",
    metrics={"loss": 0.5},
)


@given(plans)
@example(PLAN)
def test_what_was_written_is_read_back(plan: AttemptPlan) -> None:
    content = encode_plan(plan)
    assert content.count(b"\n") == 1
    assert decode_plan(content) == plan


def test_a_metric_that_is_not_finite_is_nan() -> None:
    content = encode_plan(replace(PLAN, metrics={"loss": math.inf}))
    json.loads(content, parse_constant=pytest.fail)
    assert math.isnan(decode_plan(content).metrics["loss"])


def test_layouts_are_never_mixed_up_though_their_text_is_made_once() -> None:
    plans = [replace(PLAN, layout=replace(PLAN.layout, world_size=2, digest=str(i))) for i in range(12)]
    for _ in range(3):
        for plan in plans:
            assert decode_plan(encode_plan(plan)) == plan
    changed = replace(plans[0], step=6, branch="other")
    assert decode_plan(encode_plan(changed)) == changed


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"format":"stillframe-plan/2"}', b"[" * 100_000])
def test_what_is_no_plan_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="the plan cannot be used: "):
        decode_plan(content)


@given(st.data())
def test_part_of_a_plan_is_no_plan(data: st.DataObject) -> None:
    content = encode_plan(PLAN)
    with pytest.raises(ValueError, match="the plan cannot be used: "):
        decode_plan(content[: data.draw(st.integers(0, len(content) - 2))])


FILE: dict[str, Any] = {"name": "f", "size_bytes": 8, "item_names": ["", "a"], "item_bytes": [4, 4]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": -1}, "'step' should be a whole number"),
        ({"overwrite": 1}, "'overwrite' should be true or false"),
        ({"layout": []}, "'layout' should be an object"),
        ({"metrics": {"loss": "1"}}, "the metric 'loss' is '1'"),
        ({"versions": {"torch": 2}}, "'torch' should be text"),
        ({"inline_files": [{"name": "../x", "size_bytes": 1, "crc64nvme": "0" * 16}]}, "is no name inside"),
        ({"inline_files": [{"name": "x", "size_bytes": 1, "crc64nvme": "0"}]}, "16 hexadecimal digits"),
        ({"layout": {"files": [FILE | {"name": "/x"}]}}, "'/x' is no name inside"),
        ({"layout": {"files": [FILE | {"name": "a//x"}]}}, "'a//x' is no name inside"),
        ({"layout": {"files": [FILE | {"name": ".stillframe/x"}]}}, "is a name of stillframe's own"),
        ({"layout": {"files": [FILE | {"name": "stillframe.json"}]}}, "is a name of stillframe's own"),
        ({"layout": {"files": [FILE | {"size_bytes": 9}]}}, "items of 8 bytes in a file of 9"),
        ({"layout": {"files": [FILE | {"item_bytes": [8]}]}}, "2 names of items, and 1 lengths"),
        ({"layout": {"files": [FILE | {"item_bytes": [9, -1]}]}}, "the length -1"),
        ({"layout": {"held_back": ["../../etc"]}}, "is no name inside"),
        ({"layout": {"rank_files": ["only-one"]}}, "1 files of ranks for 2 ranks"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_plan_is_said(change: dict[str, Any], said: str) -> None:
    fields = json.loads(encode_plan(PLAN))
    inner = change.get("layout")
    fields |= change | ({"layout": fields["layout"] | inner} if isinstance(inner, dict) else {})
    with pytest.raises(ValueError, match=said):
        decode_plan(json.dumps(fields).encode())
