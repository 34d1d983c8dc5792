"""Recover: what a job left whole is published, the rest removed; nothing that is not recognised is touched."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stillframe.commit.recover import recover
from stillframe.errors import SaveFailed
from stillframe.manifest import encode_manifest, read_manifest
from stillframe.names import complete_path
from stillframe.records import InlineFile, Recovered
from tests.unit.commit.attempts import ATTEMPT, STEP, Attempt, publish
from tests.unit.commit.test_publish import everything, files_in, names, publish_whole

RANK_FILES = tuple(InlineFile(name=f"checkpoint/state/rank-{r:05d}.pt", content=b"rng" * (r + 1)) for r in range(2))
WHOLE = Attempt(
    {"hf/model.safetensors": [16, 40, 0, 24], "checkpoint/__0_0.distcp": [8, 8]},
    world_size=2,
    kind="step",
    inline_files=(
        InlineFile(name="hf/config.json", content=b"{}"),
        InlineFile(name="checkpoint/.metadata", content=b"pickled"),
        InlineFile(name="checkpoint/deep/er/empty.txt", content=b""),
    ),
    held_back=("hf/config.json", "checkpoint/.metadata"),
    rank_files=RANK_FILES,
)
HIDDEN, FINAL = f".step-{STEP}.incomplete", f"step-{STEP}"


def left_whole(run_dir: Path, attempt: Attempt = WHOLE) -> Path:
    """What is there when all writers are done, and rank 0 has died."""
    publication = attempt.publication(run_dir)
    publication.prepare(attempt.rank_0_files)
    attempt.write(publication.hidden_dir)
    attempt.leave_receipts(publication.hidden_dir)
    return publication.hidden_dir


def assert_published(run_dir: Path, attempt: Attempt = WHOLE, *, sequence: int) -> None:
    final_dir = run_dir / f"{attempt.kind}-{attempt.step}"
    manifest = read_manifest(final_dir)
    assert (manifest.kind, manifest.step, manifest.attempt) == (attempt.kind, attempt.step, attempt.attempt)
    assert (manifest.sequence, manifest.world_size, manifest.layout_digest) == (sequence, 2, attempt.layout.digest)
    assert (manifest.branch, manifest.metrics, manifest.versions) == ("main", {"loss": 0.5}, {"torch": "2.13.0"})
    contents = files_in(final_dir)
    assert contents.pop("stillframe.json")
    small = {file.name: file.content for file in (*attempt.inline_files, *attempt.rank_files)}
    assert contents == attempt.contents | small
    assert manifest.files.keys() == contents.keys()
    assert {name: entry.size for name, entry in manifest.files.items()} == {n: len(c) for n, c in contents.items()}


def recovered(run_dir: Path) -> tuple[str, str, str]:
    """The only directory that there was to recover: its name, what was done, why."""
    (result,) = recover(run_dir, next_sequence=7)
    assert (result.kind, result.step) == (result.path.name[1:].split("-")[0], STEP)
    return result.path.name, result.action, result.reason


# What is whole is published


def test_an_attempt_whose_receipts_are_all_there_is_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden_dir = left_whole(tmp_path)
    with caplog.at_level(logging.WARNING, logger="stillframe"):
        (result,) = recover(tmp_path, next_sequence=7)
    reason = "all ranks had written their shares"
    assert result == Recovered(path=hidden_dir, kind="step", step=STEP, action="published", reason=reason)
    assert f"{hidden_dir}, left by a job that ended, is published: {reason}" in caplog.text
    assert names(tmp_path) == [FINAL]
    assert_published(tmp_path, sequence=7)
    assert recover(tmp_path, next_sequence=8) == ()


def test_it_is_the_same_as_if_it_had_been_published_at_once(tmp_path: Path) -> None:
    for name in ("recovered", "at once"):
        (tmp_path / name).mkdir()
    left_whole(tmp_path / "recovered")
    recover(tmp_path / "recovered", next_sequence=1)
    publish_whole(tmp_path / "at once", WHOLE)
    found, expected = (read_manifest(tmp_path / name / FINAL) for name in ("recovered", "at once"))
    assert replace(found, published_at="") == replace(expected, published_at="")
    assert list(found.files) == list(expected.files)


def test_one_that_was_to_overwrite_what_is_gone_is_published(tmp_path: Path) -> None:
    left_whole(tmp_path, replace(WHOLE, overwrite=True))
    assert recovered(tmp_path)[1] == "published"
    assert_published(tmp_path, sequence=7)


def moved_one(hidden_dir: Path) -> None:
    (hidden_dir / ".stillframe/hf/config.json").rename(hidden_dir / "hf/config.json")


def moved_all(hidden_dir: Path) -> None:
    moved_one(hidden_dir)
    (hidden_dir / ".stillframe/checkpoint/.metadata").rename(hidden_dir / "checkpoint/.metadata")


def began_a_manifest(hidden_dir: Path) -> None:
    moved_all(hidden_dir)
    (hidden_dir / ".stillframe.json.tmp").write_bytes(b'{"format": "still')


def manifest_of(hidden_dir: Path) -> bytes:
    """What the ended rank 0 would have written; made by publishing a copy."""
    run_dir = hidden_dir.parent.with_name("copy")
    run_dir.mkdir()
    return encode_manifest(read_manifest(publish_whole(run_dir, WHOLE, sequence=3)))


def wrote_the_manifest(hidden_dir: Path) -> None:
    moved_all(hidden_dir)
    (hidden_dir / "stillframe.json").write_bytes(manifest_of(hidden_dir))


def wrote_the_manifest_before_a_loss_of_power_undid_a_move(hidden_dir: Path) -> None:
    moved_one(hidden_dir)
    (hidden_dir / "stillframe.json").write_bytes(manifest_of(hidden_dir))


def began_to_remove_the_work_directory(hidden_dir: Path) -> None:
    wrote_the_manifest(hidden_dir)
    for name in ("plan.json", "receipt-00001.json", f"attempt-{ATTEMPT}"):
        (hidden_dir / ".stillframe" / name).unlink()


def removed_the_work_directory(hidden_dir: Path) -> None:
    wrote_the_manifest(hidden_dir)
    for path in sorted((hidden_dir / ".stillframe").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (hidden_dir / ".stillframe").rmdir()


def claimed_it(hidden_dir: Path) -> None:
    removed_the_work_directory(hidden_dir)
    hidden_dir.rename(complete_path(hidden_dir.parent, "step", STEP, ATTEMPT))


def wrote_another_manifest_while_recovering(hidden_dir: Path) -> None:
    removed_the_work_directory(hidden_dir)
    (hidden_dir / ".stillframe.json.tmp").write_bytes(b"{")


STAGES = [
    moved_one,
    moved_all,
    began_a_manifest,
    wrote_the_manifest,
    wrote_the_manifest_before_a_loss_of_power_undid_a_move,
    began_to_remove_the_work_directory,
    removed_the_work_directory,
    claimed_it,
    wrote_another_manifest_while_recovering,
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_wherever_the_publication_was_cut_off_it_is_finished(tmp_path: Path, stage: Callable[[Path], None]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    stage(left_whole(run_dir))
    assert recovered(run_dir)[1] == "published"
    assert names(run_dir) == [FINAL]
    assert_published(run_dir, sequence=7)


def test_several_are_published_in_the_order_of_their_steps(tmp_path: Path) -> None:
    kinds = [("hf", 10), ("checkpoint", 9), ("snapshot", 10)]
    attempts = [replace(WHOLE, kind=kind, step=step, attempt=f"{ATTEMPT}{i}") for i, (kind, step) in enumerate(kinds)]
    for attempt in attempts:
        left_whole(tmp_path, attempt)
    results = recover(tmp_path, next_sequence=4)
    assert [(r.kind, r.step, r.action) for r in results] == [
        ("checkpoint", 9, "published"),
        ("hf", 10, "published"),
        ("snapshot", 10, "published"),
    ]
    for sequence, index in ((4, 1), (5, 0), (6, 2)):
        assert_published(tmp_path, attempts[index], sequence=sequence)


# What is not whole is removed


def without(name: str) -> Callable[[Path], None]:
    return lambda hidden_dir: (hidden_dir / name).unlink()


def truncated(name: str) -> Callable[[Path], None]:
    return lambda hidden_dir: os.truncate(hidden_dir / name, (hidden_dir / name).stat().st_size - 1)


def grown(name: str) -> Callable[[Path], None]:
    return lambda hidden_dir: os.truncate(hidden_dir / name, (hidden_dir / name).stat().st_size + 1)


def receipts_of(attempt: Attempt) -> Callable[[Path], None]:
    return attempt.leave_receipts


def a_gap(hidden_dir: Path) -> None:
    WHOLE.leave_receipts(hidden_dir, WHOLE.item_pieces()[:-1])


def a_receipt_in_the_place_of_another(hidden_dir: Path) -> None:
    work_dir = hidden_dir / ".stillframe"
    (work_dir / "receipt-00001.json").write_bytes((work_dir / "receipt-00000.json").read_bytes())


def another_plan(branch: str) -> Callable[[Path], None]:
    """The plan is altered; it still reads as one."""

    def alter(hidden_dir: Path) -> None:
        path = hidden_dir / ".stillframe/plan.json"
        content = path.read_bytes()
        path.write_bytes(content.replace(b'"branch":"main"', b'"branch":"%s"' % branch.encode()))
        assert path.read_bytes() != content

    return alter


def another_step(hidden_dir: Path) -> None:
    other = left_whole(hidden_dir.parent, replace(WHOLE, step=STEP + 1))
    for path in sorted(hidden_dir.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    other.rename(hidden_dir)


def a_link_in_the_place_of(name: str) -> Callable[[Path], None]:
    def alter(hidden_dir: Path) -> None:
        path = hidden_dir / name
        moved = path.rename(hidden_dir.parent / "elsewhere")
        path.symlink_to(moved)

    return alter


def a_manifest_and_a_truncated_file(hidden_dir: Path) -> None:
    removed_the_work_directory(hidden_dir)
    truncated("hf/model.safetensors")(hidden_dir)


def claimed_and_a_missing_file(hidden_dir: Path) -> None:
    claimed_it(hidden_dir)
    (complete_path(hidden_dir.parent, "step", STEP, ATTEMPT) / "checkpoint/.metadata").unlink()


def just_made(hidden_dir: Path) -> None:
    for path in sorted(hidden_dir.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def made_but_without_a_marker(hidden_dir: Path) -> None:
    just_made(hidden_dir)
    (hidden_dir / ".stillframe").mkdir()


NOT_WHOLE = {
    "no receipt of rank 1": (
        without(".stillframe/receipt-00001.json"),
        "of rank 1, its receipt cannot be used: .*No such",
    ),
    "no receipt of rank 0": (
        without(".stillframe/receipt-00000.json"),
        "of rank 0, its receipt cannot be used: .*No such",
    ),
    "a torn receipt": (truncated(".stillframe/receipt-00001.json"), "not a whole stillframe-receipt/1 file"),
    "receipts of another attempt": (
        receipts_of(replace(WHOLE, attempt="0123456789abcdef.2")),
        "the receipt of rank 0 is of another attempt",
    ),
    "receipts of another step": (
        receipts_of(replace(WHOLE, step=STEP + 1)),
        "the receipt of rank 0 is of another attempt",
    ),
    "a receipt in the place of another": (a_receipt_in_the_place_of_another, "receipt of rank 1 is of another attempt"),
    "a gap": (a_gap, "checkpoint/__0_0.distcp: .* bytes were written"),
    "no plan": (without(".stillframe/plan.json"), "rank 0 has not written its plan"),
    "a torn plan": (lambda d: os.truncate(d / ".stillframe/plan.json", 100), "the plan cannot be used"),
    "an altered plan": (another_plan("mainly"), "plan.json: 1[0-9]+ of 1[0-9]+ bytes were written"),
    "an altered plan of that size": (another_plan("mild"), "plan.json: was written with other content than was"),
    "the plan of another step": (another_step, f"its plan is that of step step {STEP + 1}"),
    "a truncated file": (truncated("hf/model.safetensors"), "hf/model.safetensors: has 79 bytes on disk, not 80"),
    "a file too long": (grown("checkpoint/__0_0.distcp"), "has 17 bytes on disk, not 16"),
    "a truncated file of a rank": (truncated(RANK_FILES[1].name), "rank-00001.pt: has 5 bytes on disk, not 6"),
    "a missing file of a rank": (without(RANK_FILES[1].name), "rank-00001.pt: was written, and is not there any more"),
    "a missing small file": (without("checkpoint/deep/er/empty.txt"), "empty.txt: was written, and is not there"),
    "a missing file that was held back": (without(".stillframe/checkpoint/.metadata"), ".metadata: was written, and"),
    "a link for a file": (a_link_in_the_place_of("hf/model.safetensors"), "is not a regular file any more"),
    "a link for a directory": (a_link_in_the_place_of("checkpoint"), "is not a regular file any more"),
    "proven, then truncated": (a_manifest_and_a_truncated_file, "has 79 bytes on disk, not 80"),
    "claimed, then a file lost": (claimed_and_a_missing_file, "checkpoint/.metadata: was written, and is not there"),
    "just made": (just_made, "rank 0 has not written its plan"),
    "made without a marker": (made_but_without_a_marker, "rank 0 has not written its plan"),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_what_is_not_whole_is_removed_and_its_step_can_be_saved(tmp_path: Path, case: str) -> None:
    damage, said = NOT_WHOLE[case]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    damage(left_whole(run_dir))
    before = [name for name in names(run_dir) if not name.startswith(".")]
    (result,) = recover(run_dir, next_sequence=7)
    assert result.action == "removed"
    assert re.search(said, result.reason), result.reason
    assert names(run_dir) == before
    again = replace(WHOLE, attempt="fedcba9876543210.1")
    publish_whole(run_dir, again)
    assert_published(run_dir, again, sequence=1)


# What stands in the way, and what is not ours


def test_what_is_published_already_stays_and_the_later_attempt_at_it_goes(tmp_path: Path) -> None:
    publish_whole(tmp_path, WHOLE)
    before = files_in(tmp_path / FINAL)
    left_whole(tmp_path, replace(WHOLE, attempt="0123456789abcdef.2", overwrite=True, salt="new"))
    assert recovered(tmp_path) == (HIDDEN, "removed", f"{FINAL} is published")
    assert names(tmp_path) == [FINAL]
    assert files_in(tmp_path / FINAL) == before


def test_of_two_directories_for_one_step_the_one_known_to_be_whole_is_published(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    claimed_it(left_whole(run_dir))
    left_whole(run_dir, replace(WHOLE, attempt="0123456789abcdef.2", salt="new"))
    results = recover(run_dir, next_sequence=7)
    assert [(r.path.name, r.action) for r in results] == [
        (f".step-{STEP}.complete-{ATTEMPT}", "published"),
        (HIDDEN, "removed"),
    ]
    assert names(run_dir) == [FINAL]
    assert_published(run_dir, sequence=7)


@pytest.mark.parametrize("new_is_there", [True, False])
def test_a_version_that_was_replaced_never_comes_back(tmp_path: Path, new_is_there: bool) -> None:
    publish_whole(tmp_path, replace(WHOLE, salt="old"))
    new = replace(WHOLE, attempt="0123456789abcdef.2", overwrite=True)
    publication = new.publication(tmp_path)
    publication.prepare(new.rank_0_files)
    new.write(publication.hidden_dir)
    publish(publication, new.receipts(new.item_pieces()), sequence=2)
    # The process ends here, before it removes what it replaced. Later, somebody may delete the new one.
    replaced = f".step-{STEP}.complete-{new.attempt}"
    assert names(tmp_path) == [replaced, FINAL]
    if not new_is_there:
        (tmp_path / FINAL).rename(tmp_path.with_name("deleted"))
    assert recovered(tmp_path) == (replaced, "removed", f"it is what attempt {new.attempt} has replaced")
    assert names(tmp_path) == [FINAL] * new_is_there
    if new_is_there:
        assert_published(tmp_path, new, sequence=2)


@pytest.mark.parametrize("what", ["a directory", "a file", "a dangling link"])
@pytest.mark.parametrize("claimed", [True, False])
def test_something_else_of_that_name_is_not_touched_and_costs_nothing(tmp_path: Path, what: str, claimed: bool) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    hidden_dir = left_whole(run_dir)
    if claimed:
        claimed_it(hidden_dir)
    final = run_dir / FINAL
    if what == "a directory":
        final.mkdir()
        (final / "mine").touch()
    elif what == "a file":
        final.write_bytes(b"mine")
    else:
        final.symlink_to("nowhere")
    before = everything(run_dir)
    (result,) = recover(run_dir, next_sequence=7)
    assert result.action == "left"
    assert "is not a checkpoint of stillframe of that step" in result.reason
    assert "move it away" in result.reason
    assert everything(run_dir) == before
    final.rename(tmp_path / "moved away")
    assert [r.action for r in recover(run_dir, next_sequence=7)] == ["published"]
    assert_published(run_dir, sequence=7)


def test_what_is_not_recognised_is_left_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    left_whole(run_dir).rename(run_dir / ".step-05.incomplete")
    (run_dir / ".hf-1.incomplete").symlink_to(".step-05.incomplete")
    (run_dir / f".hf-2.complete-{ATTEMPT}").symlink_to(".step-05.incomplete")
    (run_dir / ".hf-3.incomplete").write_bytes(b"a file")
    (run_dir / ".hf-latest-0123456789abcdef.0").symlink_to("hf-3")
    before = everything(run_dir)
    assert recover(run_dir, next_sequence=7) == ()
    assert everything(run_dir) == before


@pytest.mark.parametrize("name", [".hf-5.incomplete", f".hf-5.complete-{ATTEMPT}"])
@pytest.mark.parametrize(
    "content",
    ["a file", "a manifest of another step", "a torn manifest", "a link as manifest", "an attempt that is none"],
)
def test_a_directory_that_no_save_made_is_left_alone_and_reported(tmp_path: Path, name: str, content: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    step = STEP if content == "a link as manifest" else STEP + 1
    published = publish_whole(tmp_path, replace(WHOLE, kind="hf", step=step))
    (run_dir / name).mkdir()
    if content == "a file":
        (run_dir / name / "mine").touch()
    elif content == "a link as manifest":
        (run_dir / name / "stillframe.json").symlink_to(published / "stillframe.json")
    else:
        manifest = (published / "stillframe.json").read_bytes()
        if content == "an attempt that is none":
            other = replace(read_manifest(published), step=STEP, attempt="../../outside", files={}, tensors={})
            manifest = encode_manifest(other)
        (run_dir / name / "stillframe.json").write_bytes(manifest[: 100 if "torn" in content else None])
    before = everything(run_dir)
    (result,) = recover(run_dir, next_sequence=7)
    assert (result.path.name, result.action) == (name, "left")
    assert re.search("was not made by a save|has no valid manifest", result.reason)
    assert everything(run_dir) == before


def test_a_directory_that_cannot_be_removed_does_not_keep_the_others(
    tmp_path: Path, immutable: Callable[[Path], None]
) -> None:
    stubborn = left_whole(tmp_path, replace(WHOLE, step=STEP - 1))
    (stubborn / ".stillframe/receipt-00000.json").unlink()
    immutable(stubborn)
    left_whole(tmp_path)
    results = recover(tmp_path, next_sequence=7)
    assert [(r.step, r.action) for r in results] == [(STEP - 1, "left"), (STEP, "published")]
    assert results[0].reason.startswith("PermissionError")
    assert names(tmp_path) == [stubborn.name, FINAL]


def test_a_whole_directory_that_cannot_be_published_now_waits_for_the_next_start(
    tmp_path: Path, immutable: Callable[[Path], None]
) -> None:
    hidden_dir = left_whole(tmp_path)
    immutable(hidden_dir / ".stillframe/hf/config.json")
    before = everything(tmp_path)
    assert recovered(tmp_path)[1] == "left"
    assert everything(tmp_path) == before


def test_a_rank_0_that_wakes_up_after_its_attempt_was_recovered_harms_nothing(tmp_path: Path) -> None:
    late = WHOLE.publication(tmp_path)
    late.prepare(WHOLE.rank_0_files)
    WHOLE.write(late.hidden_dir)
    WHOLE.leave_receipts(late.hidden_dir)
    proven = late.prove(late.receipts())
    recover(tmp_path, next_sequence=7)
    with pytest.raises(SaveFailed, match="it exists already"):
        late.publish(proven, sequence=7)
    late.clean_up()
    assert names(tmp_path) == [FINAL]
    assert_published(tmp_path, sequence=7)
