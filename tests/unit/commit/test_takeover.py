"""A rank 0 that was stopped for long and wakes after another job has taken its step over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stillframe.catalog.retention import remove_leftovers
from stillframe.errors import SaveFailed
from stillframe.manifest import read_manifest
from stillframe.names import complete_path, retired_path
from tests.unit.commit.test_publish import INLINE_FILES, STEP, WHOLE, files_in, names, publish, publish_whole


@pytest.mark.parametrize("successor_has_written", [False, True])
def test_it_does_not_publish_the_directory_of_its_successor(successor_has_written: bool, tmp_path: Path) -> None:
    late = WHOLE.publication(tmp_path)
    late.prepare(INLINE_FILES)
    WHOLE.write(late.hidden_dir)
    receipts = WHOLE.receipts(WHOLE.item_pieces())
    successor = replace(WHOLE, attempt="fedcba9876543210.1")
    publication = successor.publication(tmp_path)
    publication.prepare(INLINE_FILES)  # retires the late one's directory and makes one of the same name
    if successor_has_written:
        successor.write(publication.hidden_dir)
    before = files_in(publication.hidden_dir)
    with pytest.raises((SaveFailed, OSError)):
        publish(late, receipts)
    late.clean_up()
    assert files_in(publication.hidden_dir) == before
    assert f"hf-{STEP}" not in names(tmp_path)
    if successor_has_written:
        publish(publication, successor.receipts(successor.item_pieces()))
        publication.clean_up()
        assert read_manifest(publication.final_dir).attempt == successor.attempt
        assert names(tmp_path) == [f"hf-{STEP}"]


def test_leftovers_of_killed_runs_go_and_what_is_not_published_stays(tmp_path: Path) -> None:
    publish_whole(tmp_path)
    attempt = "fedcba9876543210.1"
    retired, unpublished = retired_path(tmp_path, "hf", 3, attempt), complete_path(tmp_path, "hf", STEP + 1, attempt)
    for directory in (retired, unpublished, tmp_path / ".hf-3.retired-by-hand"):
        (directory / "sub").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([unpublished.name, ".hf-3.retired-by-hand", f"hf-{STEP}"])
