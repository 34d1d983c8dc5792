"""Listing a run directory: what counts as a checkpoint, and in which order."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe import durable
from stillframe.catalog.directory import (
    EXPORTS,
    RESUMABLE,
    checkpoint_dir,
    damage,
    export_dir,
    list_checkpoints,
    newest,
    next_sequence,
    point_to_newest,
    steps_by_kind,
)
from stillframe.errors import NotACheckpoint
from stillframe.names import KINDS, MANIFEST_NAME
from stillframe.records import CatalogEntry
from tests.unit.catalog.run_directory import PUBLISHED_AT, add_checkpoint

ATTEMPT = "fedcba9876543210.4"


def steps(entries: tuple[CatalogEntry, ...]) -> list[int]:
    return [entry.step for entry in entries]


def test_checkpoints_are_in_the_order_of_their_publication(tmp_path: Path) -> None:
    # The run got to 400, was resumed from 100, and came to 200 on another branch.
    for sequence, step in enumerate((100, 300, 400, 200)):
        add_checkpoint(tmp_path, step, sequence=sequence)
    assert steps(list_checkpoints(tmp_path)) == [100, 300, 400, 200]
    assert newest(tmp_path, "hf") == CatalogEntry(
        path=tmp_path / "hf-200",
        kind="hf",
        step=200,
        sequence=3,
        world_size=2,
        size_bytes=2,
        published_at=PUBLISHED_AT,
    )


def test_an_empty_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == ()
    assert newest(tmp_path) is None
    assert newest(tmp_path, "hf") is None
    assert next_sequence(tmp_path) == 1


def test_only_the_kinds_that_were_asked_for_are_listed(tmp_path: Path) -> None:
    for sequence, kind in enumerate(("hf", "step", "checkpoint", "snapshot", "hf")):
        add_checkpoint(tmp_path, sequence, sequence=sequence, kind=kind)
    assert steps(list_checkpoints(tmp_path)) == [0, 1, 2, 3, 4]
    assert steps(list_checkpoints(tmp_path, "hf")) == [0, 4]
    assert steps(list_checkpoints(tmp_path, *EXPORTS)) == [0, 1, 4]
    assert steps(list_checkpoints(tmp_path, *RESUMABLE)) == [1, 2, 3]
    assert list_checkpoints(tmp_path, "dcp") == ()
    assert newest(tmp_path, "dcp") is None
    assert next_sequence(tmp_path) == 5


@pytest.mark.parametrize(
    ("kind", "checkpoint", "export"),
    [("hf", None, "."), ("checkpoint", ".", None), ("snapshot", ".", None), ("step", "checkpoint", "hf")],
)
def test_what_is_in_a_directory_of_each_kind(
    tmp_path: Path, kind: str, checkpoint: str | None, export: str | None
) -> None:
    path = add_checkpoint(tmp_path, 7, sequence=1, kind=kind)
    (entry,) = list_checkpoints(tmp_path)
    for directory_of, expected in ((checkpoint_dir, checkpoint), (export_dir, export)):
        if expected is None:
            with pytest.raises(NotACheckpoint, match=f"{kind}-7 is "):
                directory_of(entry)
        else:
            assert directory_of(entry) == path / expected
            assert directory_of(entry).is_dir()


def test_branch_and_metrics_come_from_the_manifest(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 7, sequence=1, kind="checkpoint", branch="second", metrics={"loss": 1.5})
    entry = newest(tmp_path, *RESUMABLE)
    assert entry is not None
    assert (entry.branch, entry.metrics) == ("second", {"loss": 1.5})


def test_what_changed_since_the_last_list_is_seen(tmp_path: Path) -> None:
    one = add_checkpoint(tmp_path, 1, sequence=1)
    two = add_checkpoint(tmp_path, 2, sequence=2, metrics={"loss": 1.0})
    assert steps(list_checkpoints(tmp_path)) == [1, 2]
    # Replaced by another of the same size, as an overwriting save does it.
    replacement = add_checkpoint(tmp_path, 1, sequence=3, directory=tmp_path / "new")
    durable.exchange(one, replacement)
    assert steps(list_checkpoints(tmp_path)) == [2, 1]
    # Written to in place.
    manifest = two / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().replace(b'"loss": 1.0', b'"loss": 9.25'))
    assert list_checkpoints(tmp_path)[0].metrics == {"loss": 9.25}
    manifest.write_bytes(manifest.read_bytes()[:-10])
    assert steps(list_checkpoints(tmp_path)) == [1]
    manifest.unlink()
    (one / MANIFEST_NAME).unlink()
    assert list_checkpoints(tmp_path) == ()


def test_a_metric_that_is_not_finite_is_none(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 7, sequence=1, metrics={"loss": float("nan"), "other": float("inf"), "good": 1.5})
    (entry,) = list_checkpoints(tmp_path)
    assert entry.metrics == {"good": 1.5}
    assert damage(entry) is None


def test_the_links_lead_to_the_newest_of_each_family(tmp_path: Path) -> None:
    def links() -> dict[str, str]:
        return {path.name: str(path.readlink()) for path in tmp_path.iterdir() if path.is_symlink()}

    for kind in KINDS:
        point_to_newest(tmp_path, kind, ATTEMPT)
    assert links() == {}
    for sequence, name in enumerate(("hf-5", "checkpoint-5", "snapshot-6")):
        kind, step = name.split("-")
        add_checkpoint(tmp_path, int(step), sequence=sequence, kind=kind)
        point_to_newest(tmp_path, kind, ATTEMPT)
    assert links() == {"hf-latest": "hf-5", "checkpoint-latest": "checkpoint-5", "snapshot-latest": "snapshot-6"}
    add_checkpoint(tmp_path, 4, sequence=7, kind="step")
    point_to_newest(tmp_path, "step", ATTEMPT)
    assert links() == {
        "hf-latest": "step-4/hf",
        "checkpoint-latest": "step-4/checkpoint",
        "snapshot-latest": "snapshot-6",
    }
    assert (tmp_path / "hf-latest/config.json").is_file()
    # What was published before does not become the newest by being looked at again.
    point_to_newest(tmp_path, "hf", ATTEMPT)
    assert links()["hf-latest"] == "step-4/hf"


def test_the_steps_of_every_kind(tmp_path: Path) -> None:
    for sequence, (kind, step) in enumerate((("hf", 7), ("step", 3), ("hf", 5))):
        add_checkpoint(tmp_path, step, sequence=sequence, kind=kind)
    expected = {"hf": (5, 7), "checkpoint": (), "snapshot": (), "step": (3,)}
    assert steps_by_kind(list_checkpoints(tmp_path)) == expected


def test_a_whole_checkpoint_has_no_damage(tmp_path: Path) -> None:
    for sequence, kind in enumerate(KINDS):
        add_checkpoint(tmp_path, sequence, sequence=sequence, kind=kind)
    assert [damage(entry) for entry in list_checkpoints(tmp_path)] == [None] * len(KINDS)


def no_file(path: Path) -> None:
    (path / "checkpoint/.metadata").unlink()


def no_half(path: Path) -> None:
    shutil.rmtree(path / "checkpoint")


def a_shorter_file(path: Path) -> None:
    (path / "hf/config.json").write_bytes(b"{")


def a_longer_file(path: Path) -> None:
    (path / "hf/config.json").write_bytes(b"{} ")


def a_directory_for_a_file(path: Path) -> None:
    (path / "hf/config.json").unlink()
    (path / "hf/config.json").mkdir()


def a_link_for_a_file(path: Path) -> None:
    (path / "hf/config.json").rename(path / "hf/elsewhere.json")
    (path / "hf/config.json").symlink_to("elsewhere.json")


def no_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).unlink()


def no_directory(path: Path) -> None:
    shutil.rmtree(path)


def another_checkpoint(path: Path) -> None:
    shutil.rmtree(path)
    add_checkpoint(path.parent, 7, sequence=22, kind="step")


def a_file_that_cannot_be_named(path: Path) -> None:
    manifest = path / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().replace(b"hf/config.json", b"hf/config\\u0000.json"))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (no_file, "'checkpoint/.metadata' cannot be found .*No such file"),
        (no_half, "'checkpoint/.metadata' cannot be found .*No such file"),
        (a_shorter_file, "'hf/config.json' has 1 bytes, not 2"),
        (a_longer_file, "'hf/config.json' has 3 bytes, not 2"),
        (a_directory_for_a_file, "'hf/config.json' is not a regular file"),
        (a_link_for_a_file, "'hf/config.json' is not a regular file"),
        (no_manifest, "it is gone, or its manifest is not valid any more"),
        (no_directory, "it is gone, or its manifest is not valid any more"),
        (another_checkpoint, "it has been replaced by another"),
        (a_file_that_cannot_be_named, r"'hf/config\\x00.json' cannot be found \(.*null"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, harm: Callable[[Path], None], reason: str) -> None:
    path = add_checkpoint(tmp_path, 7, sequence=1, kind="step")
    (entry,) = list_checkpoints(tmp_path)
    harm(path)
    found = damage(entry)
    assert found is not None
    assert re.search(reason, found)


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


def a_manifest_that_is_a_fifo(run_dir: Path) -> None:
    (run_dir / "hf-7").mkdir()
    os.mkfifo(run_dir / "hf-7" / MANIFEST_NAME)  # reading it would wait for ever


def a_checkpoint_under_the_name_of_another_kind(run_dir: Path) -> None:
    add_checkpoint(run_dir, 7, sequence=9, kind="snapshot", directory=run_dir / "checkpoint-7")


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
        a_manifest_that_is_a_fifo,
        a_checkpoint_under_the_name_of_another_kind,
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
    latest = newest(tmp_path, "hf")
    assert latest is not None
    assert latest.path == tmp_path / "hf-5"
