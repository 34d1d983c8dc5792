"""Retention: what is superseded, and what is never deleted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.catalog.directory import CatalogEntry, list_checkpoints
from stillframe.catalog.retention import remove, superseded
from tests.unit.catalog.run_directory import add_checkpoint

ATTEMPT = "fedcba9876543210.4"


def entry(step: int, sequence: int) -> CatalogEntry:
    return CatalogEntry(
        path=Path(f"/run/hf-{step}"),
        kind="hf",
        step=step,
        sequence=sequence,
        world_size=1,
        size_bytes=0,
        published_at="",
    )


@given(st.lists(st.integers(0, 9), unique=True), st.none() | st.integers(-2, 12))
def test_the_newest_always_stay(order: list[int], keep: int | None) -> None:
    entries = [entry(step, sequence) for sequence, step in enumerate(order)]
    gone = superseded(entries, keep=keep)
    kept = [e for e in entries if e not in gone]
    if keep is None:
        assert kept == entries
    else:
        assert kept == entries[-max(keep, 1) :]


def test_a_lower_step_that_was_published_later_is_the_newer(tmp_path: Path) -> None:
    for sequence, step in enumerate((300, 400, 200)):
        add_checkpoint(tmp_path, step, sequence=sequence)
    for superseded_entry in superseded(list_checkpoints(tmp_path), keep=2):
        remove(superseded_entry, attempt=ATTEMPT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-200", "hf-400"]


def test_only_what_was_listed_is_removed(tmp_path: Path) -> None:
    for sequence, step in enumerate((1, 2)):
        add_checkpoint(tmp_path, step, sequence=sequence)
    (tmp_path / "hf-0").mkdir()
    (tmp_path / "hf-0/mine").touch()
    (tmp_path / "hf-3").symlink_to("hf-1")
    (tmp_path / "other").mkdir()
    for superseded_entry in superseded(list_checkpoints(tmp_path), keep=1):
        remove(superseded_entry, attempt=ATTEMPT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-0", "hf-2", "hf-3", "other"]
    assert (tmp_path / "hf-0/mine").exists()


def test_removing_what_is_gone_already_is_an_error(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 1, sequence=1)
    (listed,) = list_checkpoints(tmp_path)
    remove(listed, attempt=ATTEMPT)
    with pytest.raises(FileNotFoundError):
        remove(listed, attempt=ATTEMPT)
    assert list(tmp_path.iterdir()) == []
