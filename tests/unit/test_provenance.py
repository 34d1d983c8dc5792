"""Where a checkpoint comes from: versions, and the commit of a real repository."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import stillframe
from stillframe import provenance


def git(directory: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=A. Tester", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, timeout=60)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git(tmp_path, "init")
    (tmp_path / "train.py").write_text("one")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-m", "one")
    return tmp_path


def test_the_versions_are_those_that_run() -> None:
    versions = provenance.versions()
    assert set(versions) == {"python", "stillframe", "torch", "transformers", "safetensors"}
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert versions["stillframe"] == stillframe.__version__


def test_a_commit_is_told_with_changes_to_tracked_files_only(repository: Path) -> None:
    commit = provenance.git_commit(repository)
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (repository / "untracked.log").touch()
    assert provenance.git_commit(repository) == commit
    (repository / "train.py").write_text("two")
    assert provenance.git_commit(repository) == f"{commit}-dirty"


def test_outside_of_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit(tmp_path) is None
    assert provenance.git_commit(tmp_path / "absent") is None
    assert provenance.git_diff(tmp_path) is None
    assert provenance.git_diff(tmp_path / "absent") is None


def test_a_repository_without_a_commit_has_none(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git(tmp_path, "init")
    assert provenance.git_commit(tmp_path) is None
    assert provenance.git_diff(tmp_path) is None


def test_without_git_there_is_no_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert provenance.git_commit(repository) is None
    assert provenance.git_diff(repository) is None


def test_the_diff_is_of_tracked_files_staged_or_not(repository: Path) -> None:
    (repository / "untracked.py").write_text("mine")
    assert provenance.git_diff(repository) == ""
    (repository / "train.py").write_text("two")
    unstaged = provenance.git_diff(repository)
    assert unstaged is not None
    assert unstaged.startswith("diff --git a/train.py b/train.py\n")
    assert "\n-one\n" in unstaged
    assert "\n+two\n" in unstaged
    git(repository, "add", "train.py")
    assert provenance.git_diff(repository) == unstaged


def test_the_diff_is_that_of_the_whole_repository_whatever_the_user_set(repository: Path) -> None:
    for key, value in (
        ("diff.relative", "true"),
        ("diff.noprefix", "true"),
        ("color.ui", "always"),
        ("diff.external", "false"),
    ):
        git(repository, "config", key, value)
    (repository / "train.py").write_text("two")
    (repository / "sub").mkdir()
    diff = provenance.git_diff(repository / "sub")
    assert diff is not None
    assert diff.startswith("diff --git a/train.py b/train.py\n")


def test_what_is_no_utf_8_does_not_matter(repository: Path) -> None:
    (repository / "train.py").write_bytes(b"caf\xe9")
    diff = provenance.git_diff(repository)
    assert diff is not None
    assert "+caf\ufffd\n" in diff


def test_a_diff_that_is_too_long_is_cut_and_says_so(repository: Path) -> None:
    line = "a line of a generated file, \u00e9\n"
    (repository / "train.py").write_text(line * (4 * provenance.MAX_DIFF_BYTES // len(line)))
    diff = provenance.git_diff(repository)
    assert diff is not None
    *lines, last = diff.splitlines(keepends=True)
    assert last == f"[cut here: the diff is longer than {provenance.MAX_DIFF_BYTES} bytes]\n"
    kept = "".join(lines).encode()
    assert provenance.MAX_DIFF_BYTES - len(line.encode()) - 1 <= len(kept) <= provenance.MAX_DIFF_BYTES
    assert lines[-1] == f"+{line}"
