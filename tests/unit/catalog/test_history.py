"""The run's history: what it says, that it is replaced whole, and that nothing depends on it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stillframe.catalog.directory import RESUMABLE, list_checkpoints, newest
from stillframe.catalog.history import (
    History,
    Launch,
    Published,
    RunHistory,
    decode_history,
    encode_history,
    read_history,
)
from stillframe.catalog.retention import remove
from stillframe.errors import NotACheckpoint
from tests.unit.catalog.run_directory import PUBLISHED_AT, add_checkpoint

LAUNCH = Launch(
    started_at="2026-01-02T03:00:00.000+00:00",
    ended_at=None,
    host="node-1",
    argv=("train.py", "--lr", "0.1"),
    world_size=2,
    versions={"torch": "2.13.0"},
    git_commit="0" * 40 + "-dirty",
    git_diff="-one\n+two\n",
    branch="",
    resumed_from=None,
    begin_step=0,
    end_step=0,
)


def ticking(start: datetime = datetime(2026, 1, 2, 3, tzinfo=UTC)) -> Callable[[], datetime]:
    """A clock that is a minute later each time."""
    minutes = iter(range(10_000))
    return lambda: start + timedelta(minutes=next(minutes))


def begun(run_dir: Path, **changes: Any) -> History:
    history = History(run_dir, now=ticking())
    arguments: dict[str, Any] = {
        "world_size": 2,
        "versions": {"torch": "2.13.0"},
        "git_commit": LAUNCH.git_commit,
        "git_diff": LAUNCH.git_diff,
        "argv": LAUNCH.argv,
    }
    history.begin(**arguments | changes)
    return history


def history_of(run_dir: Path) -> RunHistory:
    return read_history(run_dir / "run.json")


def test_a_run_from_its_first_launch_to_its_end(tmp_path: Path) -> None:
    history = begun(tmp_path)
    (launch,) = history_of(tmp_path).launches
    assert launch == replace(LAUNCH, host=launch.host)
    assert launch.host
    assert history_of(tmp_path).published == ()

    add_checkpoint(tmp_path, 10, sequence=1, kind="checkpoint")
    history.published(10)
    add_checkpoint(tmp_path, 20, sequence=2, kind="step")
    remove(list_checkpoints(tmp_path)[0], attempt="fedcba9876543210.4")
    history.published(20)
    recorded = history_of(tmp_path)
    assert recorded.launches == (replace(launch, end_step=20),)
    assert recorded.published == (
        Published(name="step-20", kind="step", step=20, branch="", sequence=2, published_at=PUBLISHED_AT),
    )
    history.end(25)
    assert history_of(tmp_path).launches == (replace(launch, end_step=25, ended_at="2026-01-02T03:01:00.000+00:00"),)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "step-20"]


def test_launches_add_up_and_one_that_was_killed_has_no_end(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 10, sequence=1, kind="checkpoint")
    first = begun(tmp_path)
    first.published(10)  # and then it is killed
    second = begun(tmp_path, world_size=4, git_diff=None, git_commit=None)
    second.resumed("checkpoint-10", step=10, branch="second")
    second.end()
    one, two = history_of(tmp_path).launches
    assert (one.ended_at, one.end_step, one.world_size) == (None, 10, 2)
    assert two.ended_at is not None
    assert (two.resumed_from, two.begin_step, two.end_step, two.branch) == ("checkpoint-10", 10, 10, "second")
    assert (two.git_commit, two.git_diff, two.world_size) == (None, None, 4)


def test_an_end_step_never_goes_back(tmp_path: Path) -> None:
    history = begun(tmp_path)
    history.published(20)
    history.published(10)
    history.end(5)
    assert history_of(tmp_path).launches[0].end_step == 20


def test_the_arguments_are_the_program_s_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", os.fsdecode(b"runs/\xff"), "\u00e9"])
    begun(tmp_path, argv=None)
    assert history_of(tmp_path).launches[0].argv == ("train.py", os.fsdecode(b"runs/\xff"), "\u00e9")


def test_equal_diffs_are_stored_once(tmp_path: Path) -> None:
    diff = "+a line that is long enough\n" * 1000
    for git_diff in (diff, diff, "other", diff, None):
        begun(tmp_path, git_diff=git_diff)
    assert (tmp_path / "run.json").stat().st_size < 2 * len(diff)
    assert [launch.git_diff for launch in history_of(tmp_path).launches] == [diff, diff, "other", diff, None]


def test_deleting_it_loses_history_and_nothing_else(tmp_path: Path) -> None:
    for sequence, kind in enumerate(("checkpoint", "hf", "snapshot")):
        add_checkpoint(tmp_path, 10 + sequence, sequence=sequence, kind=kind)
    begun(tmp_path).published(12)
    before = history_of(tmp_path)
    listed, resumed_from = list_checkpoints(tmp_path), newest(tmp_path, *RESUMABLE)
    (tmp_path / "run.json").unlink()
    assert (list_checkpoints(tmp_path), newest(tmp_path, *RESUMABLE)) == (listed, resumed_from)
    begun(tmp_path)
    assert history_of(tmp_path).published == before.published
    assert len(history_of(tmp_path).launches) == 1


def test_deleted_while_the_run_goes_on_it_comes_back(tmp_path: Path) -> None:
    begun(tmp_path)
    history = begun(tmp_path)
    (tmp_path / "run.json").unlink()
    history.published(10)
    assert len(history_of(tmp_path).launches) == 2


def test_a_damaged_one_is_moved_aside_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun(tmp_path)
    path, damaged = tmp_path / "run.json", tmp_path / "run.json.damaged"
    for content in (path.read_bytes()[:-20], b"\xff\xfe"):
        path.write_bytes(content)
        with caplog.at_level(logging.WARNING, logger="stillframe"):
            assert read_history(path) == RunHistory()
        assert damaged.read_bytes() == content
        assert not path.exists()
        assert f"it is now {damaged}" in caplog.text
        caplog.clear()
    begun(tmp_path)
    assert len(history_of(tmp_path).launches) == 1
    assert damaged.read_bytes() == b"\xff\xfe"


def a_directory(path: Path) -> None:
    path.mkdir()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [a_directory, a_fifo, a_dangling_link])
def test_what_is_no_file_is_left_where_it_is(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "run.json"
    make(path)
    with pytest.raises(FileExistsError, match=r"run\.json is in the way"):
        begun(tmp_path)
    assert os.path.lexists(path)


def test_a_run_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    history = begun(run_dir)
    shutil.rmtree(run_dir)
    with pytest.raises(NotACheckpoint, match="run is not a directory"):
        history.published(1)


def test_what_cannot_be_written_is_an_error_and_leaves_the_last_one(tmp_path: Path) -> None:
    history = begun(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    (tmp_path / ".run.json.tmp").mkdir()  # root, as which tests may run, writes anywhere
    with pytest.raises(IsADirectoryError):
        history.published(10)
    assert (tmp_path / "run.json").read_bytes() == before
    (tmp_path / ".run.json.tmp").rmdir()
    history.published(10)
    assert history_of(tmp_path).launches[0].end_step == 10


def test_each_write_is_durable_before_and_after_its_rename(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    program = (
        "import sys, pathlib; from stillframe.catalog.history import History\n"
        "History(pathlib.Path(sys.argv[1])).begin(world_size=1, versions={}, git_commit=None, git_diff=None)"
    )
    log = tmp_path / "strace.log"
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    command = ["strace", "-y", "-o", log, "-e", "trace=fsync,/^rename", sys.executable, "-c", program, run_dir]
    subprocess.run(command, check=True, timeout=120)
    calls = [line.partition(" = ")[0] for line in log.read_text().splitlines() if str(run_dir) in line]
    assert [call.partition("(")[0] for call in calls] == ["fsync", "rename", "fsync"]
    assert f"<{run_dir}/.run.json.tmp>" in calls[0]
    assert f"<{run_dir}>" in calls[2]


texts = st.text(st.characters())  # lone surrogates too
numbers = st.integers(0, 2**63)
launches = st.builds(
    Launch,
    started_at=texts,
    ended_at=st.none() | texts,
    host=texts,
    argv=st.lists(texts, max_size=3).map(tuple),
    world_size=numbers,
    versions=st.dictionaries(texts, texts, max_size=2),
    git_commit=st.none() | texts,
    git_diff=st.none() | texts,
    branch=texts,
    resumed_from=st.none() | texts,
    begin_step=numbers,
    end_step=numbers,
)
published = st.builds(
    Published, name=texts, kind=texts, step=numbers, branch=texts, sequence=numbers, published_at=texts
)
histories = st.builds(
    RunHistory,
    launches=st.lists(launches, max_size=3).map(tuple),
    published=st.lists(published, max_size=3).map(tuple),
)


@given(histories)
def test_what_was_written_is_read_back(history: RunHistory) -> None:
    assert decode_history(encode_history(history)) == history


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
@example(b"")
@example(b"[" * 100_000)
@example(b'{"format": "stillframe-history/2"}')
@example(b'{"format": "stillframe-history/1"}')
def test_any_other_bytes_are_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode_history(content)


FIELDS = json.loads(
    encode_history(
        RunHistory(
            launches=(LAUNCH,),
            published=(Published(name="hf-1", kind="hf", step=1, branch="", sequence=1, published_at=PUBLISHED_AT),),
        )
    )
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where every value inside of nested dicts and lists is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [place for key, item in items for place in places(item, (*path, key))]
    return [path, *inner] if path else inner


@given(st.sampled_from(places(FIELDS)), json_values)
def test_any_field_of_any_other_kind_is_refused_or_harmless(place: tuple[str | int, ...], value: Any) -> None:
    fields = json.loads(json.dumps(FIELDS))
    holder = fields
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with contextlib.suppress(ValueError):
        history = decode_history(json.dumps(fields).encode())
        assert decode_history(encode_history(history)) == history


def test_fields_of_a_later_writer_are_ignored() -> None:
    fields = json.loads(json.dumps(FIELDS)) | {"new": [1]}
    fields["launches"][0]["new"] = None
    assert decode_history(json.dumps(fields).encode()) == decode_history(json.dumps(FIELDS).encode())
