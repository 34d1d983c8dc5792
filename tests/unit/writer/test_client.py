"""The writer process and its client, with real processes throughout."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

from stillframe.receipts import decode_receipt
from stillframe.records import Extent, FileShare, WritePlan
from stillframe.writer.client import MEANT_FOR_THE_TRAINER, WriterClient, WriterError, _environment
from tests.unit.writer.saves import (
    Scenario,
    SharedArena,
    check_receipt,
    count_own_descriptors,
    make_attempt_dir,
    make_request,
    receipt_name,
    scenarios,
    wait_for_exit,
    whole_file_plan,
)

CONTENTS = {"model-00001-of-00002.safetensors": os.urandom(3 << 20), "model-00002-of-00002.safetensors": b"the rest"}


@pytest.fixture
def client() -> Iterator[WriterClient]:
    with WriterClient() as started:
        yield started


def set_plan(client: WriterClient, contents: dict[str, bytes], *, plan_id: int = 1) -> WritePlan:
    plan, arena = whole_file_plan(contents, plan_id=plan_id)
    with SharedArena(arena) as shared:
        client.set_plans([plan], shared.fd)
    return plan


def open_files(pid: int) -> dict[int, str]:
    return {int(path.name): str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}


def check_save(client: WriterClient, plan: WritePlan, contents: dict[str, bytes], directory: Path) -> None:
    make_attempt_dir(directory)
    receipt = client.write(make_request(directory, plan), timeout_s=60)
    check_receipt(receipt, plan, contents)
    for name, content in contents.items():
        assert (directory / name).read_bytes() == content


def test_a_save_with_inline_files(client: WriterClient, tmp_path: Path) -> None:
    plan = set_plan(client, CONTENTS)
    # More than a socket buffer holds, so that the request crosses it in parts.
    inline = {"config.json": b"{}", "tokenizer/tokenizer.json": os.urandom(5 << 20), "empty.txt": b""}
    directory = make_attempt_dir(tmp_path / "attempt")
    progress: list[tuple[int, int]] = []
    receipt = client.write(
        make_request(directory, plan, inline), timeout_s=60, on_progress=lambda *counts: progress.append(counts)
    )
    everything = CONTENTS | inline
    check_receipt(receipt, plan, everything)
    assert [file.name for file in receipt.files] == [*inline, *CONTENTS]
    assert (receipt.kind, receipt.step, receipt.attempt, receipt.layout_digest) == ("hf", 100, "0a1b", "digest")
    for name, content in everything.items():
        assert (directory / name).read_bytes() == content
    assert decode_receipt((directory / receipt_name(0)).read_bytes()) == receipt
    left_over = [path.name for path in (directory / ".stillframe").iterdir()]
    assert sorted(left_over) == ["attempt-0a1b", "receipt-00000.json"]
    all_bytes = sum(len(content) for content in everything.values())
    assert progress[0] == (0, all_bytes)
    assert progress == sorted(progress)
    assert {total for _, total in progress} == {all_bytes}


def test_any_layout_by_three_ranks_at_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(WriterClient()) for _ in range(3)]
        ranks = stack.enter_context(ThreadPoolExecutor(3))

        @given(scenarios(ranks=3))
        @settings(max_examples=20, deadline=None)
        def check(scenario: Scenario) -> None:
            with tempfile.TemporaryDirectory(dir=tmp_path) as temporary:
                directory = make_attempt_dir(Path(temporary) / "attempt")

                def save(rank: int) -> None:
                    with SharedArena(scenario.arenas[rank]) as arena:
                        clients[rank].set_plans([scenario.plans[rank]], arena.fd)
                    receipt = clients[rank].write(make_request(directory, scenario.plans[rank]), timeout_s=60)
                    check_receipt(receipt, scenario.plans[rank], scenario.contents)
                    assert decode_receipt((directory / receipt_name(rank)).read_bytes()) == receipt

                list(ranks.map(save, range(3)))
                for name, content in scenario.contents.items():
                    assert (directory / name).read_bytes() == content

        check()


def test_the_arena_is_shared_not_copied(client: WriterClient, tmp_path: Path) -> None:
    plan, content = whole_file_plan({"f": b"first"})
    with SharedArena(content) as arena:
        client.set_plans([plan], arena.fd)
        assert arena.map is not None
        for number, text in enumerate((b"first", b"again", b"third")):
            arena.map[:5] = text
            check_save(client, plan, {"f": text}, tmp_path / str(number))


def test_a_new_plan_takes_the_place_of_the_old(client: WriterClient, tmp_path: Path) -> None:
    old = set_plan(client, {"f": b"old"}, plan_id=1)
    for plan_id in range(2, 6):
        contents = {"f": os.urandom(100 * plan_id)}
        plan = set_plan(client, contents, plan_id=plan_id)
        check_save(client, plan, contents, tmp_path / str(plan_id))
    with pytest.raises(RuntimeError, match="with plan 1"):
        client.write(make_request(make_attempt_dir(tmp_path / "old"), old), timeout_s=60)
    # Of five arenas, one is mapped and held.
    assert Path(f"/proc/{client.pid}/maps").read_text().count("memfd:test-arena") == 1
    assert sum("memfd:test-arena" in file for file in open_files(client.pid).values()) == 1


def test_several_plans_over_one_arena(client: WriterClient, tmp_path: Path) -> None:
    content = os.urandom(9000)
    plans = []
    for plan_id, (start, length) in enumerate([(0, 9000), (100, 5000), (4096, 1)], start=1):
        extent = Extent(file_offset=0, arena_offset=start, length_bytes=length)
        share = FileShare(name=f"file-{plan_id}", size_bytes=length, extents=(extent,))
        plan, _ = whole_file_plan({}, plan_id=plan_id)
        plans.append(replace(plan, arena_bytes=start + length, files=(share,)))
    with SharedArena(content) as arena:
        client.set_plans(plans, arena.fd)
    for plan in (plans[2], plans[0], plans[1], plans[0]):
        extent = plan.files[0].extents[0]
        expected = content[extent.arena_offset : extent.arena_offset + extent.length_bytes]
        directory = tmp_path / os.urandom(4).hex()
        check_save(client, plan, {plan.files[0].name: expected}, directory)


def test_a_rank_with_nothing_to_write_leaves_a_receipt_too(client: WriterClient, tmp_path: Path) -> None:
    plan = set_plan(client, {})
    check_save(client, plan, {}, tmp_path / "attempt")
    assert decode_receipt((tmp_path / "attempt" / receipt_name(0)).read_bytes()).files == ()


def test_relative_directories_are_the_callers(
    client: WriterClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = set_plan(client, CONTENTS)
    monkeypatch.chdir(tmp_path)
    check_save(client, plan, CONTENTS, Path("attempt"))
    assert (tmp_path / "attempt" / receipt_name(0)).exists()


def test_modes_follow_the_umask_of_the_trainer(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        client = WriterClient()
    finally:
        os.umask(before)
    directory = make_attempt_dir(tmp_path / "attempt")
    with client:
        plan = set_plan(client, {"f": b"1"})
        client.write(make_request(directory, plan, {"a/b": b""}), timeout_s=60)
    names = ("f", "a", "a/b", receipt_name(0))
    assert [stat.S_IMODE((directory / name).stat().st_mode) for name in names] == [0o640, 0o750, 0o640, 0o640]


# --- what is refused; the process stays usable after each


def test_the_directory_of_another_attempt_is_not_touched(client: WriterClient, tmp_path: Path) -> None:
    plan = set_plan(client, CONTENTS)
    (tmp_path / "attempt/.stillframe").mkdir(parents=True)
    with pytest.raises(WriterError, match="belongs to another attempt, or to none") as caught:
        client.write(make_request(tmp_path / "attempt", plan, {"a": b""}), timeout_s=60)
    assert caught.value.kind == "failed"
    assert [path.name for path in (tmp_path / "attempt").iterdir()] == [".stillframe"]
    check_save(client, plan, CONTENTS, tmp_path / "another")


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/../../x"])
def test_inline_names_that_lead_out_are_refused(client: WriterClient, tmp_path: Path, name: str) -> None:
    plan = set_plan(client, CONTENTS)
    directory = make_attempt_dir(tmp_path / "attempt")
    with pytest.raises(WriterError, match="no name inside a directory"):
        client.write(make_request(directory, plan, {name: b"escaped"}), timeout_s=60)
    assert [path.name for path in tmp_path.iterdir()] == ["attempt"]


def test_a_link_planted_at_a_files_name_is_refused(client: WriterClient, tmp_path: Path) -> None:
    plan = set_plan(client, {"f": b"new"})
    directory = make_attempt_dir(tmp_path / "attempt")
    (tmp_path / "victim").write_bytes(b"untouched")
    (directory / "f").symlink_to(tmp_path / "victim")
    with pytest.raises(WriterError, match=r"opening 'f' failed.*it is a symbolic link") as caught:
        client.write(make_request(directory, plan), timeout_s=60)
    assert (caught.value.file_name, caught.value.errno) == ("f", errno.ELOOP)
    assert (tmp_path / "victim").read_bytes() == b"untouched"
    assert not (directory / receipt_name(0)).exists()


def test_a_full_disk(client: WriterClient, mount: Callable[[str, str], Path]) -> None:
    small_disk = mount("tmpfs", "size=2m")
    plan = set_plan(client, CONTENTS)
    directory = make_attempt_dir(small_disk / "attempt")
    with pytest.raises(WriterError, match=r"'model-00001-of-00002\.safetensors' failed: No space left") as caught:
        client.write(make_request(directory, plan), timeout_s=60)
    assert (caught.value.kind, caught.value.errno) == ("failed", errno.ENOSPC)
    assert caught.value.file_name == "model-00001-of-00002.safetensors"
    assert not (directory / receipt_name(0)).exists()
    shutil.rmtree(directory)
    contents = {"f": bytes(1 << 20)}
    check_save(client, set_plan(client, contents), contents, small_disk / "smaller")


def test_impossible_plans_are_refused(client: WriterClient, tmp_path: Path) -> None:
    plan = set_plan(client, CONTENTS)
    extent = Extent(file_offset=0, arena_offset=0, length_bytes=4096)
    beyond_arena = WritePlan(
        plan_id=2,
        rank=0,
        world_size=1,
        layout_digest="d",
        arena_bytes=4096,
        files=(FileShare(name="f", size_bytes=4095, extents=(extent,)),),
    )
    with SharedArena(bytes(100)) as arena:
        with pytest.raises(WriterError, match=r"needs an arena of \d+ bytes, and the descriptor has 100") as caught:
            client.set_plans([plan], arena.fd)
        assert caught.value.kind == "failed"
        with pytest.raises(WriterError, match="an extent of 'f' ends at 4096, past its 4095 bytes"):
            client.set_plans([beyond_arena], arena.fd)
    with pytest.raises(RuntimeError, match="before set_plans"):
        client.write(make_request(tmp_path, plan), timeout_s=60)
    check_save(client, set_plan(client, CONTENTS), CONTENTS, tmp_path / "attempt")


def test_one_thread_at_a_time(client: WriterClient, tmp_path: Path) -> None:
    plan = set_plan(client, CONTENTS)
    directory = make_attempt_dir(tmp_path / "attempt")
    refused = []

    def use_it_too(_done_bytes: int, _total_bytes: int) -> None:
        if not refused:
            with pytest.raises(RuntimeError, match="serves one at a time") as caught:
                client.write(make_request(directory, plan), timeout_s=60)
            refused.append(caught)

    client.write(make_request(directory, plan), timeout_s=60, on_progress=use_it_too)
    assert refused


# --- the process, and its end


def test_the_process_is_light_and_apart(tmp_path: Path) -> None:
    with (tmp_path / "of the trainer").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        client = WriterClient()
    with client:
        check_save(client, set_plan(client, CONTENTS), CONTENTS, tmp_path / "attempt")
        mapped = Path(f"/proc/{client.pid}/maps").read_text()
        assert "awscrt" in mapped
        for library in ("torch", "numpy", "safetensors"):
            assert library not in mapped
        assert os.getsid(client.pid) == client.pid
        files = open_files(client.pid)
        assert (files.pop(0), files.pop(1)) == ("/dev/null", "/dev/null")
        assert files.pop(2) == str(Path("/proc/self/fd/2").readlink())
        kinds = sorted(re.sub(r"\d+", "n", file) for file in files.values())
        assert kinds == ["/memfd:test-arena (deleted)", "anon_inode:[eventfd]", "anon_inode:[pidfd]", "socket:[n]"]


def test_the_process_imports_neither_torch_nor_numpy() -> None:
    code = "import stillframe.writer.process, sys; print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_the_process_finds_the_same_package_but_its_backports_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert _environment(Path("/checkout/src"), ["/lib/site-packages"])["PYTHONPATH"] == "/checkout/src"
    assert "PYTHONPATH" not in _environment(Path("/lib/site-packages"), ["/lib/site-packages"])
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert _environment(Path("/checkout/src"), ["/lib/site-packages"])["PYTHONPATH"] == "/checkout/src:/mine"
    assert _environment(Path("/lib/site-packages"), ["/lib/site-packages"])["PYTHONPATH"] == "/mine"


def test_what_is_sent_to_end_a_job_means_the_trainer(client: WriterClient, tmp_path: Path) -> None:
    for number in MEANT_FOR_THE_TRAINER:
        os.kill(client.pid, number)
    check_save(client, set_plan(client, CONTENTS), CONTENTS, tmp_path / "attempt")
    assert client.alive


def test_a_process_that_starts_does_not_heed_it_either_and_the_trainer_does(tmp_path: Path) -> None:
    """Not even before its first line of Python runs."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\n" + "".join(f"kill -{number} $$\n" for number in MEANT_FOR_THE_TRAINER) + "exit 3\n")
    script.chmod(0o755)
    with pytest.raises(WriterError, match="ended with status 3"):
        WriterClient(python=str(script))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_closing_ends_the_process_and_can_be_repeated() -> None:
    client = WriterClient()
    client.close()
    client.close()
    assert not client.alive
    assert not Path(f"/proc/{client.pid}").exists()
    with pytest.raises(RuntimeError, match="closed"):
        set_plan(client, {})


def test_clients_leave_no_descriptor_behind(tmp_path: Path) -> None:
    before = count_own_descriptors()
    for number in range(4):
        with WriterClient() as client:
            check_save(client, set_plan(client, CONTENTS), CONTENTS, tmp_path / str(number))
        assert count_own_descriptors() == before


def test_a_dropped_client_leaves_no_process_behind() -> None:
    clients = [WriterClient()]
    pidfd = os.pidfd_open(clients[0].pid)
    with pytest.warns(ResourceWarning, match="still running"):  # Popen's, for who forgets to close
        clients.clear()
    wait_for_exit(pidfd)
    os.close(pidfd)


def test_a_process_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    broken_python = tmp_path / "python"
    broken_python.write_text("#!/bin/sh\nexit 3\n")
    broken_python.chmod(0o755)
    before = count_own_descriptors()
    with pytest.raises(WriterError, match=r"ended with status 3; what it had to say is on standard error") as caught:
        WriterClient(python=str(broken_python))
    assert caught.value.kind == "died"
    broken_python.write_text("#!/bin/sh\nexec sleep 3600\n")
    with pytest.raises(WriterError, match=r"did not start within 0.1 s and was killed") as caught:
        WriterClient(python=str(broken_python), start_timeout_s=0.1)
    assert caught.value.kind == "timeout"
    with pytest.raises(FileNotFoundError):
        WriterClient(python=str(tmp_path / "none"))
    assert count_own_descriptors() == before


def test_an_error_in_on_progress_does_not_leave_a_write_behind(client: WriterClient, tmp_path: Path) -> None:
    plan = set_plan(client, CONTENTS)
    directory = make_attempt_dir(tmp_path / "attempt")

    def fail(_done_bytes: int, _total_bytes: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.write(make_request(directory, plan), timeout_s=60, on_progress=fail)
    assert not client.alive
    with pytest.raises(WriterError, match="was killed by SIGKILL") as caught:
        client.write(make_request(directory, plan), timeout_s=60)
    assert caught.value.kind == "died"


def test_close_waits_for_a_write_in_another_thread(client: WriterClient, tmp_path: Path) -> None:
    plan = set_plan(client, CONTENTS)
    directory = make_attempt_dir(tmp_path / "attempt")
    handed_over = threading.Event()
    with ThreadPoolExecutor(1) as background:
        write = background.submit(
            client.write, make_request(directory, plan), timeout_s=60, on_progress=lambda *_: handed_over.set()
        )
        assert handed_over.wait(60)
        client.close()
        check_receipt(write.result(timeout=60), plan, CONTENTS)
    assert not client.alive
