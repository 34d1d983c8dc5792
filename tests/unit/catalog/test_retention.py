"""Retention on real directories: what goes, what stays, and what is never touched."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stillframe.catalog.directory import list_checkpoints
from stillframe.catalog.retention import Superseded, remove, retain
from stillframe.errors import OptionError
from stillframe.names import MANIFEST_NAME
from stillframe.policies import KeepAll, KeepBest, KeepEvery, KeepLast, Retention, RetentionPolicy
from stillframe.records import CatalogEntry
from tests.unit.catalog.run_directory import add_checkpoint

ATTEMPT = "fedcba9876543210.4"
NOW = datetime(2026, 1, 3, tzinfo=UTC)


def retained(
    run_dir: Path,
    *,
    checkpoints: RetentionPolicy | None = None,
    exports: RetentionPolicy | None = None,
    branch: str = "",
) -> Superseded:
    retention = Retention(checkpoints=checkpoints or KeepAll(), exports=exports or KeepAll())
    return retain(run_dir, retention, branch=branch, now=NOW, attempt=ATTEMPT)


def names_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def add_all(run_dir: Path, *names: str, branch: str = "") -> None:
    """Checkpoints of these names, published in this order after what is there."""
    first = len(list_checkpoints(run_dir))
    for sequence, name in enumerate(names, start=first):
        kind, step = name.split("-")
        add_checkpoint(run_dir, int(step), sequence=sequence, kind=kind, branch=branch)


def test_a_lower_step_that_was_published_later_is_the_newer(tmp_path: Path) -> None:
    add_all(tmp_path, "hf-300", "hf-400", "hf-200")
    result = retained(tmp_path, exports=KeepLast(2))
    assert [entry.path.name for entry in result.entries] == ["hf-300"]
    assert names_in(tmp_path) == ["hf-200", "hf-400"]


def test_each_family_has_its_rule_and_of_snapshots_the_newest_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        add_all(tmp_path, f"hf-{step}", f"checkpoint-{step}", f"snapshot-{step}")
    retained(tmp_path, checkpoints=KeepLast(2))
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-3", "hf-1", "hf-2", "hf-3", "snapshot-3"]


@pytest.mark.parametrize(
    ("checkpoints", "exports", "kept"),
    [
        (KeepLast(1), KeepLast(1), ["step-4"]),
        (KeepLast(2), KeepLast(1), ["step-3", "step-4"]),
        (KeepLast(1), KeepEvery(2), ["step-2", "step-4"]),
        (KeepEvery(3), KeepEvery(2), ["step-2", "step-3", "step-4"]),
        (KeepAll(), KeepLast(1), ["step-1", "step-2", "step-3", "step-4"]),
    ],
    ids=repr,
)
def test_what_was_published_together_goes_when_neither_rule_keeps_it(
    tmp_path: Path, checkpoints: RetentionPolicy, exports: RetentionPolicy, kept: list[str]
) -> None:
    add_all(tmp_path, "step-1", "step-2", "step-3", "step-4")
    retained(tmp_path, checkpoints=checkpoints, exports=exports)
    assert names_in(tmp_path) == kept


def test_a_step_counts_among_exports_and_among_checkpoints(tmp_path: Path) -> None:
    add_all(tmp_path, "hf-1", "checkpoint-1", "step-2", "hf-3")
    retained(tmp_path, checkpoints=KeepLast(1), exports=KeepLast(1))
    assert names_in(tmp_path) == ["hf-3", "step-2"]  # the newest checkpoint is that of step 2


def test_another_branch_is_left_alone(tmp_path: Path) -> None:
    add_all(tmp_path, "checkpoint-100", "checkpoint-200", "checkpoint-300", "snapshot-310")
    add_all(tmp_path, "checkpoint-150", "checkpoint-250", "snapshot-260", "snapshot-270", branch="second")
    result = retained(tmp_path, checkpoints=KeepLast(1), branch="second")
    assert [entry.path.name for entry in result.entries] == ["checkpoint-150", "snapshot-260"]
    assert names_in(tmp_path) == [
        "checkpoint-100",
        "checkpoint-200",
        "checkpoint-250",
        "checkpoint-300",
        "snapshot-270",
        "snapshot-310",
    ]
    # Nor does what the second branch published supersede anything of the first.
    retained(tmp_path, checkpoints=KeepLast(1), branch="")
    assert names_in(tmp_path) == ["checkpoint-250", "checkpoint-300", "snapshot-270", "snapshot-310"]


def test_the_newest_stays_where_no_rule_keeps_it(tmp_path: Path) -> None:
    add_all(tmp_path, "checkpoint-1", "checkpoint-2", "hf-1", "hf-2")
    retained(tmp_path, checkpoints=KeepBest("loss"), exports=KeepEvery(1000))
    assert names_in(tmp_path) == ["checkpoint-2", "hf-2"]


def test_only_what_is_recognised_whole_is_removed(tmp_path: Path) -> None:
    add_all(tmp_path, "hf-1", "hf-2")
    (tmp_path / "hf-0").mkdir()
    (tmp_path / "hf-0/mine").touch()
    (tmp_path / "hf-3").symlink_to("hf-1")
    (tmp_path / "other").mkdir()
    add_checkpoint(tmp_path, 9, sequence=0, directory=tmp_path / "hf-10")
    retained(tmp_path, exports=KeepLast(1))
    assert names_in(tmp_path) == ["hf-0", "hf-10", "hf-2", "hf-3", "other"]
    assert (tmp_path / "hf-0/mine").exists()


def test_a_damaged_newest_supersedes_nothing_and_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_all(tmp_path, "checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4")
    for step in (3, 4):
        (tmp_path / f"checkpoint-{step}/config.json").write_bytes(b"{")
    with caplog.at_level(logging.ERROR, logger="stillframe"):
        result = retained(tmp_path, checkpoints=KeepLast(1))
    assert [(found.entry.step, found.reason) for found in result.damaged] == [
        (4, "'config.json' has 1 bytes, not 2"),
        (3, "'config.json' has 1 bytes, not 2"),
    ]
    # The last good one is kept, and so is what may be needed of the damaged ones.
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert "checkpoint-4 is published, but is not whole any more: 'config.json' has 1 bytes, not 2" in caplog.text
    # A good one that is published later supersedes them all.
    add_all(tmp_path, "checkpoint-5")
    retained(tmp_path, checkpoints=KeepLast(1))
    assert names_in(tmp_path) == ["checkpoint-5"]


def test_where_nothing_is_whole_nothing_goes(tmp_path: Path) -> None:
    add_all(tmp_path, "snapshot-1", "snapshot-2")
    for step in (1, 2):
        (tmp_path / f"snapshot-{step}/config.json").unlink()
    assert retained(tmp_path).entries == ()
    assert names_in(tmp_path) == ["snapshot-1", "snapshot-2"]


def test_a_newest_without_its_manifest_supersedes_nothing(tmp_path: Path) -> None:
    add_all(tmp_path, "checkpoint-1", "checkpoint-2")
    (tmp_path / "checkpoint-2" / MANIFEST_NAME).write_bytes(b"")
    retained(tmp_path, checkpoints=KeepLast(1))
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_damage_in_one_family_holds_nothing_up_in_another(tmp_path: Path) -> None:
    add_all(tmp_path, "hf-1", "checkpoint-1", "hf-2", "checkpoint-2")
    (tmp_path / "checkpoint-2/config.json").unlink()
    result = retained(tmp_path, checkpoints=KeepLast(1), exports=KeepLast(1))
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2", "hf-2"]
    assert [found.entry.path.name for found in result.damaged] == ["checkpoint-2"]


class KeepsAndFails(RetentionPolicy):
    def kept(self, entries: Sequence[CatalogEntry], *, now: datetime) -> frozenset[CatalogEntry]:
        raise KeyError("loss")


def test_a_rule_that_raises_removes_nothing_and_is_named(tmp_path: Path) -> None:
    add_all(tmp_path, "hf-1", "hf-2", "checkpoint-1", "checkpoint-2")
    with pytest.raises(OptionError, match=r"the retention policy .*KeepsAndFails.* failed.*KeyError: 'loss'"):
        retained(tmp_path, checkpoints=KeepsAndFails(), exports=KeepLast(1))
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2", "hf-1", "hf-2"]


def test_removing_what_is_gone_already_is_an_error(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 1, sequence=1)
    (listed,) = list_checkpoints(tmp_path)
    remove(listed, attempt=ATTEMPT)
    with pytest.raises(FileNotFoundError):
        remove(listed, attempt=ATTEMPT)
    assert list(tmp_path.iterdir()) == []
