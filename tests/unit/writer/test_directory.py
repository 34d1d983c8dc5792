from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.writer.directory import FileWriteError, OpenDirectory


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[OpenDirectory]:
    with OpenDirectory(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../b", "a//b", ".", "", "a/", "./a", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(directory: OpenDirectory, tmp_path: Path, name: str) -> None:
    for use in (directory.has_file, directory.open_shared, lambda name: directory.write_new(name, b"")):
        with pytest.raises(ValueError, match="no name inside a directory"):
            use(name)
    assert list(tmp_path.iterdir()) == []


def test_subdirectories_are_made(directory: OpenDirectory, tmp_path: Path) -> None:
    directory.write_new("a/b/c.txt", b"deep")
    (tmp_path / "made by another rank").mkdir()
    directory.write_new("made by another rank/d.txt", b"")
    directory.sync()
    assert (tmp_path / "a/b/c.txt").read_bytes() == b"deep"
    assert (tmp_path / "made by another rank/d.txt").read_bytes() == b""


def test_a_new_file_must_be_new(directory: OpenDirectory, tmp_path: Path) -> None:
    directory.write_new("a.txt", b"first")
    with pytest.raises(FileWriteError, match=r"opening 'a.txt' failed: File exists \(EEXIST\)") as caught:
        directory.write_new("a.txt", b"second")
    assert caught.value.file_name == "a.txt"
    assert (tmp_path / "a.txt").read_bytes() == b"first"


def test_a_file_that_others_write_too_is_open_for_writing_only(directory: OpenDirectory) -> None:
    fd = directory.open_shared("shared")
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    finally:
        os.close(fd)


def test_a_replaced_file_is_whole_and_leaves_nothing_beside_it(directory: OpenDirectory, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for content in (b"one", b"two, longer", b"3"):
        directory.replace("sub/r.json", content)
        assert (tmp_path / "sub/r.json").read_bytes() == content
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["r.json"]


def test_no_symbolic_link_is_followed(directory: OpenDirectory, tmp_path: Path) -> None:
    outside = tmp_path.with_name("outside")
    outside.mkdir()
    (outside / "victim").write_bytes(b"untouched")
    (tmp_path / "file").symlink_to(outside / "victim")
    (tmp_path / "sub").symlink_to(outside, target_is_directory=True)
    (tmp_path / "to itself").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(FileWriteError, match=r"'file' failed: .*ELOOP.*symbolic link, and a save follows none"):
        directory.open_shared("file")
    with pytest.raises(FileWriteError, match="'sub/new'"):
        directory.write_new("sub/new", b"")
    assert not directory.has_file("file")
    with pytest.raises(FileWriteError, match="opening the directory"):
        OpenDirectory(tmp_path / "to itself")
    assert [path.name for path in outside.iterdir()] == ["victim"]
    assert (outside / "victim").read_bytes() == b"untouched"


def test_what_is_opened_stays_itself_when_its_path_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "attempt"
    path.mkdir()
    with OpenDirectory(path) as opened:
        path.rename(tmp_path / "moved")
        path.mkdir()
        opened.write_new("a.txt", b"")
    assert (tmp_path / "moved/a.txt").exists()
    assert list(path.iterdir()) == []


def test_modes_follow_the_umask(directory: OpenDirectory, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        directory.write_new("sub/new", b"")
        os.close(directory.open_shared("shared"))
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("sub", "sub/new", "shared")}
    assert modes == {"sub": 0o750, "sub/new": 0o640, "shared": 0o640}


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileWriteError, match=r"gone' failed: No such file or directory \(ENOENT\)"):
        OpenDirectory(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(FileWriteError, match="ENOTDIR"):
        OpenDirectory(tmp_path / "file")


def test_only_regular_files_count_as_files(directory: OpenDirectory, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/marker").touch()
    assert directory.has_file("sub/marker")
    assert not directory.has_file("sub")
    assert not directory.has_file("sub/other")
    assert not directory.has_file("nowhere/marker")
    assert not (tmp_path / "nowhere").exists()
