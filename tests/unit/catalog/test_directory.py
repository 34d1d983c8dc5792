"""Listing a run directory: what counts as a checkpoint, and in which order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe.catalog.directory import CatalogEntry, latest_checkpoint, list_checkpoints
from stillframe.errors import NotACheckpoint
from stillframe.names import MANIFEST_NAME
from tests.unit.catalog.run_directory import add_checkpoint


def steps(entries: tuple[CatalogEntry, ...]) -> list[int]:
    return [entry.step for entry in entries]


def test_checkpoints_are_in_the_order_of_their_publication(tmp_path: Path) -> None:
    # The run got to 400, was resumed from 100, and came to 200 on another branch.
    for sequence, step in enumerate((100, 300, 400, 200)):
        add_checkpoint(tmp_path, step, sequence=sequence)
    assert steps(list_checkpoints(tmp_path)) == [100, 300, 400, 200]
    latest = latest_checkpoint(tmp_path, "hf")
    assert latest == CatalogEntry(
        path=tmp_path / "hf-200",
        kind="hf",
        step=200,
        sequence=3,
        world_size=2,
        size_bytes=2,
        published_at="2026-01-02T03:04:05.678+00:00",
    )


def test_an_empty_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == ()
    assert latest_checkpoint(tmp_path, "hf") is None


def test_only_the_kind_that_was_asked_for_is_listed(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 1, sequence=1)
    assert steps(list_checkpoints(tmp_path, "hf")) == [1]
    assert list_checkpoints(tmp_path, "dcp") == ()
    assert latest_checkpoint(tmp_path, "dcp") is None


@pytest.mark.parametrize("name", ["absent", "file"])
def test_what_is_no_directory_is_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotACheckpoint, match=f"{name} is not a directory"):
        list_checkpoints(tmp_path / name)


def a_file(run_dir: Path) -> None:
    (run_dir / "hf-7").write_text("mine")


def a_fifo(run_dir: Path) -> None:
    os.mkfifo(run_dir / "hf-7")  # reading it would wait for ever


def a_link_to_a_checkpoint(run_dir: Path) -> None:
    (run_dir / "hf-7").symlink_to("hf-5")


def a_link_to_a_checkpoint_elsewhere(run_dir: Path) -> None:
    add_checkpoint(run_dir, 7, sequence=9, directory=run_dir / "elsewhere")
    (run_dir / "hf-7").symlink_to("elsewhere")


def a_dangling_link(run_dir: Path) -> None:
    (run_dir / "hf-7").symlink_to("nowhere")


def a_link_to_itself(run_dir: Path) -> None:
    (run_dir / "hf-7").symlink_to("hf-7")


def an_empty_directory(run_dir: Path) -> None:
    (run_dir / "hf-7").mkdir()


def a_directory_of_another_tool(run_dir: Path) -> None:
    (run_dir / "hf-7").mkdir()
    (run_dir / "hf-7/model.safetensors").write_bytes(b"")


def a_manifest_that_is_torn(run_dir: Path) -> None:
    directory = add_checkpoint(run_dir, 7, sequence=9)
    manifest = directory / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes()[:-20])


def a_manifest_of_another_step(run_dir: Path) -> None:
    add_checkpoint(run_dir, 6, sequence=9, directory=run_dir / "hf-7")


def a_manifest_that_is_a_directory(run_dir: Path) -> None:
    (run_dir / "hf-7" / MANIFEST_NAME).mkdir(parents=True)


def a_manifest_that_is_a_link_to_itself(run_dir: Path) -> None:
    (run_dir / "hf-7").mkdir()
    (run_dir / "hf-7" / MANIFEST_NAME).symlink_to(MANIFEST_NAME)


def a_hidden_directory(run_dir: Path) -> None:
    add_checkpoint(run_dir, 7, sequence=9, directory=run_dir / ".hf-7.incomplete")


def a_retired_directory(run_dir: Path) -> None:
    add_checkpoint(run_dir, 7, sequence=9, directory=run_dir / ".hf-7.retired-0123456789abcdef.1")


def a_step_with_a_leading_zero(run_dir: Path) -> None:
    add_checkpoint(run_dir, 7, sequence=9, directory=run_dir / "hf-07")


def a_step_in_other_digits(run_dir: Path) -> None:
    add_checkpoint(run_dir, 7, sequence=9, directory=run_dir / "hf-٧")


@pytest.mark.parametrize(
    "add_odd_thing",
    [
        a_file,
        a_fifo,
        a_link_to_a_checkpoint,
        a_link_to_a_checkpoint_elsewhere,
        a_dangling_link,
        a_link_to_itself,
        an_empty_directory,
        a_directory_of_another_tool,
        a_manifest_that_is_torn,
        a_manifest_of_another_step,
        a_manifest_that_is_a_directory,
        a_manifest_that_is_a_link_to_itself,
        a_hidden_directory,
        a_retired_directory,
        a_step_with_a_leading_zero,
        a_step_in_other_digits,
    ],
)
def test_what_is_no_checkpoint_is_neither_listed_nor_in_the_way(
    tmp_path: Path, add_odd_thing: Callable[[Path], None]
) -> None:
    add_checkpoint(tmp_path, 5, sequence=1)
    (tmp_path / "hf-latest").symlink_to("hf-5")
    add_odd_thing(tmp_path)
    assert steps(list_checkpoints(tmp_path)) == [5]
    latest = latest_checkpoint(tmp_path, "hf")
    assert latest is not None
    assert latest.path == tmp_path / "hf-5"
