"""Steps of the file system: what is there afterwards, what a killed run may leave, what a reader sees between."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from stillframe import durable
from stillframe.testing import run_process


def make_version(directory: Path, version: str) -> Path:
    directory.mkdir()
    for name in ("first", "second"):
        (directory / name).write_text(version)
    return directory


def whole_version(directory: Path) -> str:
    """The version of both files of a directory, reached through one descriptor."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = set()
        for name in ("first", "second"):
            with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=descriptor)) as file:
                found.add(file.read())
    finally:
        os.close(descriptor)
    assert len(found) == 1, f"a mixture: {found}"
    return found.pop()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# write_file


def test_a_file_is_written_whole_over_what_was_there_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    (tmp_path / ".manifest.json.tmp").write_bytes(b"left by a run that was killed, and longer than what comes")
    for content in (b"one", b"another", b""):
        durable.write_file(path, content)
        assert path.read_bytes() == content
        assert names(tmp_path) == ["manifest.json"]


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    (tmp_path / ".file.tmp").symlink_to(victim)
    with pytest.raises(OSError, match=r"\.file\.tmp") as caught:
        durable.write_file(tmp_path / "file", b"new")
    assert caught.value.errno == errno.ELOOP
    (tmp_path / "file").symlink_to(victim)
    (tmp_path / ".file.tmp").unlink()
    durable.write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()
    assert victim.read_bytes() == b"untouched"


def modes_of_written_files(directory: Path) -> dict[int, int]:
    modes = {}
    for umask in (0o022, 0o027, 0o077):
        os.umask(umask)
        durable.write_file(directory / "file", b"")
        modes[umask] = stat.S_IMODE((directory / "file").stat().st_mode)
    return modes


def test_files_follow_the_umask(tmp_path: Path) -> None:
    # In a process of its own: the umask belongs to the whole process.
    assert run_process(modes_of_written_files, tmp_path) == {0o022: 0o644, 0o027: 0o640, 0o077: 0o600}


# publish


def test_publishing_renames_and_never_replaces(tmp_path: Path) -> None:
    final = tmp_path / "final"
    durable.publish(make_version(tmp_path / "hidden", "1"), final)
    assert names(tmp_path) == ["final"]
    second = make_version(tmp_path / "hidden", "2")
    with pytest.raises(FileExistsError, match="final"):
        durable.publish(second, final)
    assert (whole_version(final), whole_version(second)) == ("1", "2")


@pytest.mark.parametrize("in_the_way", ["a file", "an empty directory", "a dangling link"])
def test_publishing_is_refused_whatever_has_the_name(tmp_path: Path, in_the_way: str) -> None:
    final = tmp_path / "final"
    if in_the_way == "a file":
        final.write_text("mine")
    elif in_the_way == "an empty directory":
        final.mkdir()
    else:
        final.symlink_to("nowhere")
    inode = final.lstat().st_ino
    with pytest.raises(FileExistsError):
        durable.publish(make_version(tmp_path / "hidden", "1"), final)
    assert final.lstat().st_ino == inode
    assert whole_version(tmp_path / "hidden") == "1"


# exchange


def test_exchange_swaps_two_directories(tmp_path: Path) -> None:
    one, other = make_version(tmp_path / "one", "1"), make_version(tmp_path / "other", "2")
    durable.exchange(one, other)
    assert (whole_version(one), whole_version(other)) == ("2", "1")


def test_exchange_needs_both(tmp_path: Path) -> None:
    one = make_version(tmp_path / "one", "1")
    with pytest.raises(FileNotFoundError):
        durable.exchange(one, tmp_path / "absent")
    assert whole_version(one) == "1"
    assert names(tmp_path) == ["one"]


def test_a_reader_sees_one_whole_version_at_every_instant(tmp_path: Path) -> None:
    final, other = make_version(tmp_path / "final", "1"), make_version(tmp_path / "other", "2")
    swaps = 300
    ready, done = threading.Event(), threading.Event()
    seen: list[str] = []
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while not done.is_set():
                seen.append(whole_version(final))
                ready.set()
            seen.append(whole_version(final))
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)
            ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert ready.wait(60)
    for _ in range(swaps + 1):
        durable.exchange(final, other)
    done.set()
    reader.join(60)
    assert not errors
    assert (seen[0], seen[-1]) == ("1", "2")
    assert (whole_version(final), whole_version(other)) == ("2", "1")


def test_whether_exchange_works_is_found_out_without_leaving_anything(tmp_path: Path) -> None:
    assert durable.can_exchange(tmp_path, "0123456789abcdef.1")
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        durable.can_exchange(tmp_path / "absent", "0123456789abcdef.1")


# replace_link


def test_a_link_is_relative_and_replaced_in_one_step(tmp_path: Path) -> None:
    link = tmp_path / "hf-latest"
    (tmp_path / ".hf-latest-tag").symlink_to("left by a run that was killed")
    for target in ("hf-1", "hf-2", "hf-2"):
        (tmp_path / target).mkdir(exist_ok=True)
        durable.replace_link(link, target, "tag")
        assert link.readlink() == Path(target)
        assert names(tmp_path) == sorted({"hf-1", target, "hf-latest"})
    tmp_path.rename(tmp_path.with_name("moved"))
    assert (tmp_path.with_name("moved") / "hf-latest").resolve() == tmp_path.with_name("moved") / "hf-2"


def test_a_link_that_dangles_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "hf-latest").symlink_to("hf-0")
    durable.replace_link(tmp_path / "hf-latest", "hf-1", "tag")
    assert (tmp_path / "hf-latest").readlink() == Path("hf-1")


@pytest.mark.parametrize("in_the_way", ["a file", "a directory"])
def test_what_is_no_link_is_not_replaced_by_one(tmp_path: Path, in_the_way: str) -> None:
    link = tmp_path / "hf-latest"
    if in_the_way == "a file":
        link.write_text("mine")
    else:
        make_version(link, "mine")
    with pytest.raises(FileExistsError, match=r"exists and is not a symbolic link: .*hf-latest"):
        durable.replace_link(link, "hf-1", "tag")
    assert names(tmp_path) == ["hf-latest"]
    assert link.is_file() or whole_version(link) == "mine"


# retire


def test_what_is_retired_is_gone_with_all_that_is_in_it(tmp_path: Path) -> None:
    directory = make_version(tmp_path / "hf-1", "1")
    make_version(directory / "sub", "1")
    outside = make_version(tmp_path / "outside", "1")
    (directory / "link").symlink_to(outside, target_is_directory=True)
    durable.retire(directory, tmp_path / ".retired")
    assert names(tmp_path) == ["outside"]
    assert whole_version(outside) == "1"


def test_retiring_needs_the_directory_and_replaces_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.retire(tmp_path / "absent", tmp_path / ".retired")
    directory, in_the_way = make_version(tmp_path / "hf-1", "1"), make_version(tmp_path / ".retired", "0")
    with pytest.raises(OSError, match="not empty"):
        durable.retire(directory, in_the_way)
    assert (whole_version(directory), whole_version(in_the_way)) == ("1", "0")


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    durable.remove_tree(tmp_path / "absent")
    durable.remove_tree(make_version(tmp_path / "there", "1"))
    assert names(tmp_path) == []


def test_fsync_of_what_is_no_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, error in (("absent", FileNotFoundError), ("file", NotADirectoryError)):
        with pytest.raises(error):
            durable.fsync_dir(tmp_path / path)
