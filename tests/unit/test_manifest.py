"""The manifest: read back as it was written, and refused by one exception if it is anything else."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stillframe.errors import CorruptCheckpoint, LoadError, NotACheckpoint
from stillframe.manifest import FileEntry, Manifest, TensorEntry, decode_manifest, encode_manifest, read_manifest
from stillframe.records import Gathered, Reshuffled

PATH = Path("/run/hf-5/stillframe.json")
MANIFEST = Manifest(
    kind="hf",
    step=5,
    attempt="0123456789abcdef.1",
    sequence=3,
    world_size=2,
    layout_digest="d" * 64,
    published_at="2026-01-02T03:04:05.678+00:00",
    git_commit=None,
    versions={"torch": "2.13.0"},
    balance=1.0,
    files={
        "model.safetensors": FileEntry(size=72, crc64nvme="00000000000000ff"),
        "config.json": FileEntry(size=0, crc64nvme="0" * 16),
    },
    tensors={
        "a.weight": TensorEntry(file="model.safetensors", offset=8, size=64, crc64nvme="f" * 16),
        "empty": TensorEntry(file="model.safetensors", offset=72, size=0, crc64nvme="0" * 16),
    },
    branch="main",
    metrics={"loss": 0.5},
    gathered=Gathered(keys=("a.weight",), bucket_bytes=1024),
    reshuffled=Reshuffled(tensors=1, size_bytes=64, bucket_bytes=32),
)

counts = st.integers(min_value=0, max_value=2**63)
texts = st.text(st.characters(exclude_categories=["Cs"]))
crcs = st.integers(0, 2**64 - 1).map("{:016x}".format)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    files = draw(st.dictionaries(texts, st.builds(FileEntry, size=counts, crc64nvme=crcs), max_size=3))
    tensors = {}
    for name in draw(st.lists(texts, unique=True, max_size=3)) if files else []:
        file = draw(st.sampled_from(sorted(files)))
        offset = draw(st.integers(0, files[file].size))
        size = draw(st.integers(0, files[file].size - offset))
        tensors[name] = TensorEntry(file=file, offset=offset, size=size, crc64nvme=draw(crcs))
    return Manifest(
        kind=draw(texts),
        step=draw(counts),
        attempt=draw(texts),
        sequence=draw(counts),
        world_size=draw(counts),
        layout_digest=draw(texts),
        published_at=draw(texts),
        git_commit=draw(st.none() | texts),
        versions=draw(st.dictionaries(texts, texts, max_size=3)),
        balance=draw(st.floats(0, 10**9)),
        files=files,
        tensors=tensors,
        branch=draw(texts),
        metrics=draw(st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False), max_size=3)),
        gathered=draw(
            st.none() | st.builds(Gathered, keys=st.lists(texts, max_size=3).map(tuple), bucket_bytes=counts)
        ),
        reshuffled=draw(st.none() | st.builds(Reshuffled, tensors=counts, size_bytes=counts, bucket_bytes=counts)),
    )


@given(manifests())
def test_what_was_written_is_read_back(manifest: Manifest) -> None:
    assert decode_manifest(encode_manifest(manifest), PATH) == manifest


def test_the_size_is_that_of_all_files() -> None:
    assert MANIFEST.size_bytes == 72


def test_fields_of_a_later_writer_are_ignored() -> None:
    fields = json.loads(encode_manifest(MANIFEST)) | {"new": [1]}
    fields["files"]["config.json"]["new"] = None
    assert decode_manifest(json.dumps(fields).encode(), PATH) == MANIFEST


@pytest.mark.parametrize(
    "version", ["stillframe-manifest/2", "stillframe-manifest", "", None, 1, ["stillframe-manifest/1"]]
)
def test_an_unknown_version_is_refused_and_named(version: Any) -> None:
    fields = json.loads(encode_manifest(MANIFEST)) | {"format": version}
    with pytest.raises(CorruptCheckpoint, match="is not known to this version of stillframe") as caught:
        decode_manifest(json.dumps(fields).encode(), PATH)
    assert str(PATH) in str(caught.value)
    assert repr(version) in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
@example(b"")
@example(b"\xff\xfe{")
@example(b"[" * 100_000)
@example(b'{"format": "stillframe-manifest/1"')
def test_any_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(CorruptCheckpoint, match=str(PATH)):
        decode_manifest(content, PATH)


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where every value inside of nested dicts is."""
    inner = (
        [place for key, item in value.items() for place in places(item, (*path, key))]
        if isinstance(value, dict)
        else []
    )
    return [path, *inner] if path else inner


FIELDS = json.loads(encode_manifest(MANIFEST))
OPTIONAL = [("files", "config.json"), ("branch",), ("metrics",), ("reshuffled",), ("gathered",)]


@given(st.sampled_from(places(FIELDS)), json_values)
@example(("balance",), 10**400)
@example(("balance",), float("nan"))
@example(("files", "model.safetensors", "size"), -1)
@example(("metrics", "loss"), None)
@example(("metrics", "loss"), 10**400)
@example(("metrics", "loss"), float("inf"))
def test_any_field_of_any_other_kind_is_refused_or_harmless(place: tuple[str, ...], value: Any) -> None:
    fields = json.loads(json.dumps(FIELDS))
    holder = fields
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with contextlib.suppress(CorruptCheckpoint):
        manifest = decode_manifest(json.dumps(fields).encode(), PATH)
        # What is accepted is a manifest: it can be written again, and is then the same.
        again = decode_manifest(encode_manifest(manifest), PATH)
        assert repr(again) == repr(manifest)  # in which, unlike in ==, NaN is NaN


@pytest.mark.parametrize("place", places(FIELDS), ids="/".join)
def test_a_missing_field_is_refused_unless_it_is_an_entry_of_its_own(place: tuple[str, ...]) -> None:
    fields = json.loads(json.dumps(FIELDS))
    holder = fields
    for key in place[:-1]:
        holder = holder[key]
    del holder[place[-1]]
    optional = place[:-1] in (("versions",), ("tensors",), ("metrics",)) or place in OPTIONAL
    if optional:
        assert decode_manifest(json.dumps(fields).encode(), PATH) != MANIFEST
    else:
        with pytest.raises(CorruptCheckpoint, match=str(PATH)):
            decode_manifest(json.dumps(fields).encode(), PATH)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("tensors", "a.weight", "size"), 65, "'a.weight' is said to be 65 bytes at offset 8 .* has 72 bytes"),
        (("tensors", "a.weight", "file"), "other", "'other', which is not listed"),
        (("tensors", "a.weight", "crc64nvme"), "F" * 16, "not 16 hexadecimal digits"),
        (("files", "config.json", "crc64nvme"), "0x", "not 16 hexadecimal digits"),
        (("step",), -5, "step is -5"),
        (("step",), True, "step is a bool, not a int"),
        (("branch",), None, "branch is a NoneType, not a str"),
        (("metrics", "loss"), "0.5", "the metric 'loss' is '0.5'"),
        (("metrics", "loss"), float("nan"), "the metric 'loss' is nan"),
        (("metrics", "loss"), True, "the metric 'loss' is True"),
    ],
)
def test_a_contradiction_is_refused_and_named(place: tuple[str, ...], value: Any, said: str) -> None:
    fields = json.loads(json.dumps(FIELDS))
    holder = fields
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(CorruptCheckpoint, match=said):
        decode_manifest(json.dumps(fields).encode(), PATH)


def test_a_manifest_from_before_there_were_branches_metrics_and_reshuffles_has_none() -> None:
    added = ("branch", "metrics", "reshuffled", "gathered")
    fields = {name: value for name, value in FIELDS.items() if name not in added}
    manifest = decode_manifest(json.dumps(fields).encode(), PATH)
    assert manifest == replace(MANIFEST, branch="", metrics={}, reshuffled=None, gathered=None)


def test_a_metric_that_is_not_finite_does_not_cost_the_checkpoint() -> None:
    content = encode_manifest(replace(MANIFEST, metrics={"loss": float("inf"), "other": float("nan"), "good": 1.5}))
    assert json.loads(content, parse_constant=pytest.fail)["metrics"] == {"loss": None, "other": None, "good": 1.5}
    metrics = decode_manifest(content, PATH).metrics
    assert math.isnan(metrics["loss"])
    assert math.isnan(metrics["other"])
    assert metrics["good"] == 1.5


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    for checkpoint_dir in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NotACheckpoint, match="not a checkpoint of stillframe"):
            read_manifest(checkpoint_dir)
    (tmp_path / "file").touch()
    with pytest.raises(NotACheckpoint):
        read_manifest(tmp_path / "file")
    (tmp_path / "stillframe.json").mkdir()
    with pytest.raises(NotACheckpoint):
        read_manifest(tmp_path)


def test_a_manifest_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "stillframe.json").symlink_to("stillframe.json")
    with pytest.raises(LoadError, match=r"stillframe\.json: cannot be read: Too many levels of symbolic links"):
        read_manifest(tmp_path)
