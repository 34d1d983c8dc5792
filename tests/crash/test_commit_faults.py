"""The commit under a microscope: killed at, or failed in, each of its system calls; and the order of those calls."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from awscrt.checksums import crc64nvme

from stillframe.catalog.directory import list_checkpoints
from stillframe.manifest import read_manifest
from tests.crash.publishing import FIRST, OLDER, SECOND, THIRD, publish_once, start
from tests.unit.commit.attempts import Attempt

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

REPOSITORY_DIR = Path(__file__).parents[2]
# What changes a directory or makes a change durable, under all the names that C libraries use.
CHANGES = "mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,symlink,symlinkat,fsync"


def run(run_dir: Path, log_path: Path, *options: str, mode: str = "") -> tuple[int, str]:
    """Publish in a process of its own under strace; its exit status and what it printed. `mode`: see publishing.py."""
    # With the filter the process stops only at calls that are traced; but strace 6.1 sends no signals with it.
    quickly = [] if any("signal=" in option for option in options) else ["--seccomp-bpf"]
    command = ["strace", *quickly, "-f", "-y", "-o", str(log_path), *options]
    command += [sys.executable, "-P", "-m", "tests.crash.publishing", str(run_dir)]
    done = subprocess.run(
        [*command, *filter(None, [mode])],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY_DIR,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY_DIR), *filter(None, sys.path)])},
    )
    if "Operation not permitted" in done.stderr and "ptrace" in done.stderr:
        pytest.skip(f"tracing is not permitted here: {done.stderr.strip()}")
    return done.returncode, done.stdout + done.stderr


def make_run(run_dir: Path, *, overwrite: bool) -> Path:
    """A run with an older checkpoint, and with the one that is to be replaced if it is."""
    run_dir.mkdir()
    publish_once(run_dir, OLDER, sequence=1)
    if overwrite:
        publish_once(run_dir, FIRST, sequence=2)
    return run_dir


def version_of(checkpoint_dir: Path, *versions: Attempt) -> Attempt:
    """Which one a published checkpoint is; it must be one of them, and whole."""
    entries = read_manifest(checkpoint_dir).files
    for name, entry in entries.items():
        content = (checkpoint_dir / name).read_bytes()
        assert (len(content), f"{crc64nvme(content):016x}") == (entry.size, entry.crc64nvme)
    files = {str(path.relative_to(checkpoint_dir)) for path in checkpoint_dir.rglob("*") if path.is_file()}
    assert files == {*entries, "stillframe.json"}
    assert {"config.json", "sub/last.json", "sub/state-1"} < files
    found = [
        v for v in versions if v.contents["model.safetensors"] == (checkpoint_dir / "model.safetensors").read_bytes()
    ]
    assert len(found) == 1
    return found[0]


def hidden_names(run_dir: Path) -> list[str]:
    """What is left of attempts; a probe, or a link that was being made, are empty."""
    names = [path.name for path in run_dir.iterdir() if path.name.startswith(".")]
    return [name for name in names if not name.startswith((".stillframe-probe-", ".hf-latest-"))]


@dataclass(frozen=True)
class Call:
    """One traced system call: the `count`th of its `name`, which is how strace finds it again; and its whole line."""

    name: str
    count: int
    line: str

    def injection(self, what: str) -> tuple[str, ...]:
        return ("-e", f"trace={CHANGES}", "-e", f"inject={self.name}:{what}:when={self.count}")


def trace(run_dir: Path, log_path: Path, *, mode: str = "") -> list[Call]:
    """The calls of an undisturbed publication that change the run directory or make a change durable, in order.

    Of files that are removed one after the other, the first stands for all.
    """
    status, said = run(run_dir, log_path, "-e", f"trace={CHANGES}", mode=mode)
    assert (status, said.strip()) == (0, "published")
    counts: Counter[str] = Counter()
    found = []
    for line in log_path.read_text().splitlines():
        match = re.match(r"\d+ +(\w+)\(", line)
        if match is not None:
            counts[match[1]] += 1
            is_ours = str(run_dir) in line or "/proc/self/fd/" in line
            goes_on = bool(found) and found[-1].name == match[1] == "unlinkat"
            if is_ours and line.endswith("= 0") and not goes_on:
                found.append(Call(match[1], counts[match[1]], line))
    return found


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_step_it_leaves_one_whole_version_and_can_be_done_again(tmp_path: Path, overwrite: bool) -> None:
    log_path = tmp_path / "log"
    mode = "--overwrite" if overwrite else ""
    found = trace(make_run(tmp_path / "traced", overwrite=overwrite), log_path, mode=mode)
    assert len(found) > 10
    outcomes, recovered = [], []
    # A process that is killed at an fsync leaves what one leaves that is killed at the change after it.
    for number, call in enumerate(call for call in found if call.name != "fsync"):
        run_dir = make_run(tmp_path / str(number), overwrite=overwrite)
        status, said = run(run_dir, log_path, *call.injection("signal=SIGKILL"), mode=mode)
        assert status == -signal.SIGKILL, f"not killed at {call.line}: {said}"
        final_dir = run_dir / "hf-5"
        if overwrite:
            is_new = version_of(final_dir, FIRST, SECOND) is SECOND
        else:
            is_new = final_dir.exists()
            assert not is_new or version_of(final_dir, FIRST) is FIRST
        assert is_new or "published" not in said, "what was reported as published is not there"
        outcomes.append(is_new)
        # What is superseded goes last: there is always one, and the link names one.
        listed = {entry.path.name for entry in list_checkpoints(run_dir)}
        assert all(version_of(run_dir / name, OLDER, FIRST, SECOND) for name in listed)
        assert (run_dir / "hf-latest").readlink().name in listed
        # And then a job starts.
        written = list(run_dir.glob(".hf-5.*/**/receipt-00001.json"))
        actions = start(run_dir)
        if final_dir.exists():
            assert version_of(final_dir, FIRST, SECOND) is (SECOND if overwrite and is_new else FIRST)
        was_recovered = "published" in actions
        assert was_recovered or overwrite or is_new or not written, "what was written whole is gone"
        assert final_dir.exists() == (overwrite or is_new or was_recovered)
        assert hidden_names(run_dir) == []
        newest = "hf-5" if final_dir.exists() else "hf-4"
        assert (run_dir / "hf-latest").readlink().name == newest
        recovered.append(was_recovered)
        # Which does it again.
        publish_once(run_dir, THIRD, sequence=9, overwrite=True)
        assert version_of(final_dir, THIRD) is THIRD
        assert (run_dir / "hf-latest").readlink().name == "hf-5"
        assert hidden_names(run_dir) == []
    assert outcomes == sorted(outcomes), "once it is published, it stays"
    assert set(outcomes) == {False, True}
    assert set(recovered) == ({False} if overwrite else {False, True})


def leave(run_dir: Path, attempt: Attempt) -> Path:
    """What is there when all writers are done, and rank 0 has died."""
    publication = attempt.publication(run_dir)
    publication.prepare(attempt.rank_0_files)
    attempt.write(publication.hidden_dir)
    attempt.leave_receipts(publication.hidden_dir)
    return publication.hidden_dir


def make_run_to_recover(run_dir: Path) -> Path:
    """Step 4 is published, 5 is left whole, and of 6 a receipt is missing."""
    make_run(run_dir, overwrite=False)
    leave(run_dir, FIRST)
    (leave(run_dir, replace(SECOND, step=6)) / ".stillframe/receipt-00001.json").unlink()
    return run_dir


@pytest.mark.parametrize("what", ["signal=SIGKILL", "error=EIO"])
def test_a_recovery_that_is_cut_off_at_any_step_is_finished_by_the_next(tmp_path: Path, what: str) -> None:
    log_path = tmp_path / "log"
    found = trace(make_run_to_recover(tmp_path / "traced"), log_path, mode="--recover")
    assert len(found) > 10
    for number, call in enumerate(call for call in found if what == "error=EIO" or call.name != "fsync"):
        run_dir = make_run_to_recover(tmp_path / str(number))
        status, said = run(run_dir, log_path, *call.injection(what), mode="--recover")
        if what == "error=EIO":
            assert status == 0, said
            assert "INJECTED" in log_path.read_text()
        else:
            assert status == -signal.SIGKILL, f"not killed at {call.line}: {said}"
        for entry in list_checkpoints(run_dir):
            assert version_of(entry.path, OLDER, FIRST)
        start(run_dir)
        assert version_of(run_dir / "hf-5", FIRST) is FIRST, f"lost where this failed: {call.line}"
        assert hidden_names(run_dir) == []
        assert {entry.path.name: entry.sequence for entry in list_checkpoints(run_dir)} == {"hf-4": 1, "hf-5": 2}
        assert (run_dir / "hf-latest").readlink().name == "hf-5"


@pytest.mark.parametrize("overwrite", [False, True])
def test_where_any_step_fails_it_is_said_and_what_is_there_is_whole(tmp_path: Path, overwrite: bool) -> None:
    log_path = tmp_path / "log"
    mode = "--overwrite" if overwrite else ""
    found = trace(make_run(tmp_path / "traced", overwrite=overwrite), log_path, mode=mode)
    told = set()
    for number, call in enumerate(found):
        run_dir = make_run(tmp_path / str(number), overwrite=overwrite)
        status, said = run(run_dir, log_path, *call.injection("error=EIO"), mode=mode)
        assert "INJECTED" in log_path.read_text()
        assert status == 0, said
        assert "Input/output error" in said, f"nobody said that this failed: {call.line}"
        is_published = said.startswith("published")
        told.add(is_published)
        final_dir = run_dir / "hf-5"
        if is_published:
            assert version_of(final_dir, SECOND if overwrite else FIRST)
        elif overwrite:
            assert version_of(final_dir, FIRST) is FIRST, "a save that failed has replaced the version before"
        else:
            assert not final_dir.exists(), "a save that failed is visible"
        assert (run_dir / "hf-latest").readlink().name in {entry.path.name for entry in list_checkpoints(run_dir)}
    assert told == {False, True}


def test_each_change_is_durable_before_the_next_one_relies_on_it(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", overwrite=False)
    lines = [call.line for call in trace(run_dir, tmp_path / "log")]
    hidden = run_dir / ".hf-5.incomplete"
    steps = [
        ("the hidden directory is made", rf"mkdir\S* ?.*{hidden}\""),
        ("its marker has its content", rf"fsync\(\d+<{hidden}/.stillframe/.attempt"),
        ("and its name", rf"fsync\(\d+<{hidden}/.stillframe>"),
        ("the work directory has its name", rf"fsync\(\d+<{hidden}>"),
        ("the hidden directory has its name", rf"fsync\(\d+<{run_dir}>"),
        ("the config comes when all is proven", r"rename\w*\(.*\.stillframe/config\.json\""),
        ("and what lies deeper", r"rename\w*\(.*\.stillframe/sub/last\.json\""),
        ("whose name is durable", rf"fsync\(\d+<{hidden}/sub>"),
        ("as is the config's", rf"fsync\(\d+<{hidden}>"),
        ("the manifest has its content", rf"fsync\(\d+<{hidden}/\.stillframe\.json\.tmp"),
        ("the manifest gets its name", r"rename\w*\(.*/\.stillframe\.json\.tmp\""),
        ("which is durable", rf"fsync\(\d+<{hidden}>"),
        ("before the receipts go", rf"unlink\w*\(\d+<{hidden}/\.stillframe[/>]"),
        ("which is durable", rf"fsync\(\d+<{hidden}>"),
        ("before it is published", rf"rename\w*\(.*{run_dir}/\.hf-5\..*\", .*{run_dir}/hf-5\""),
        ("which is durable", rf"fsync\(\d+<{run_dir}>"),
        ("before the link names it", r"rename\w*\(.*hf-latest\""),
        ("which is durable", rf"fsync\(\d+<{run_dir}>"),
        ("before the older one goes", r"rename\w*\(.*hf-4\", .*hf-4\.retired-"),
        ("which is durable", rf"fsync\(\d+<{run_dir}>"),
        ("before its files go", r"unlink\w*\(.*\.retired-"),
    ]
    position = 0
    for what, pattern in steps:
        matches = [index for index in range(position, len(lines)) if re.search(pattern, lines[index])]
        assert matches, f"not seen, or too early: {what}"
        position = matches[0] + 1
