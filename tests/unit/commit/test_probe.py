"""The probe of the run directory: what each rank finds out, and that nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillframe.commit.probe import Probe
from stillframe.errors import RunDirectoryError

NONCE = "0123456789abcdef"


def test_ranks_that_share_a_directory_leave_nothing_in_it(tmp_path: Path) -> None:
    probe = Probe(tmp_path, NONCE)
    probe.begin()
    for rank in range(3):
        Probe(tmp_path, NONCE).take_part(rank)
    probe.end(3)
    probe.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_sees_another_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="is not the directory that rank 0 sees there"):
        Probe(tmp_path, NONCE).take_part(1)
    with pytest.raises(RunDirectoryError, match="is not the directory that rank 0 sees there"):
        Probe(tmp_path / "absent", NONCE).take_part(1)


def test_ranks_whose_files_do_not_arrive_are_named(tmp_path: Path) -> None:
    probe = Probe(tmp_path, NONCE)
    probe.begin()
    for rank in (0, 2):
        probe.take_part(rank)
    with pytest.raises(RunDirectoryError, match=r"what ranks 1, 3 write to .* does not reach rank 0"):
        probe.end(4)
    probe.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["absent", "file"])
def test_what_cannot_be_written_is_said_to_be_so(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").touch()
    probe = Probe(tmp_path / what, NONCE)
    with pytest.raises(RunDirectoryError, match=f"cannot write in the run directory .*/{what}: N"):
        probe.begin()
    probe.remove()


def test_two_checkpointers_of_one_run_do_not_meet_each_other_s_probe(tmp_path: Path) -> None:
    one, other = Probe(tmp_path, NONCE), Probe(tmp_path, "fedcba9876543210")
    one.begin()
    other.begin()
    one.take_part(0)
    with pytest.raises(RunDirectoryError, match="what ranks 0 write"):
        other.end(1)
    other.remove()
    one.end(1)
    one.remove()
    assert list(tmp_path.iterdir()) == []
