"""The commit under a microscope: killed at, or failed in, each of its system calls; and the order of those calls."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from awscrt.checksums import crc64nvme

from stillframe.catalog.directory import list_checkpoints
from stillframe.catalog.retention import remove_leftovers
from stillframe.manifest import read_manifest
from tests.crash.publishing import FIRST, OLDER, SECOND, THIRD, publish_once
from tests.unit.commit.attempts import Attempt

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

REPOSITORY_DIR = Path(__file__).parents[2]
# What changes a directory or makes a change durable, under all the names that C libraries use.
CHANGES = "mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,symlink,symlinkat,fsync"


def run(run_dir: Path, log_path: Path, *options: str, overwrite: bool) -> tuple[int, str]:
    """Publish in a process of its own under strace; its exit status and what it printed."""
    command = ["strace", "-f", "-y", "-o", str(log_path), *options]
    command += [sys.executable, "-P", "-m", "tests.crash.publishing", str(run_dir)]
    done = subprocess.run(
        [*command, *(["--overwrite"] if overwrite else [])],
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
    assert not (checkpoint_dir / ".stillframe").exists()
    found = [
        v for v in versions if v.contents["model.safetensors"] == (checkpoint_dir / "model.safetensors").read_bytes()
    ]
    assert len(found) == 1
    return found[0]


@dataclass(frozen=True)
class Call:
    """One traced system call: the `count`th of its `name`, which is how strace finds it again; and its whole line."""

    name: str
    count: int
    line: str

    def injection(self, what: str) -> tuple[str, ...]:
        return ("-e", f"trace={CHANGES}", "-e", f"inject={self.name}:{what}:when={self.count}")


def trace(run_dir: Path, log_path: Path, *, overwrite: bool) -> list[Call]:
    """The calls of an undisturbed publication that change the run directory or make a change durable, in order.

    Of files that are removed one after the other, the first stands for all.
    """
    status, said = run(run_dir, log_path, "-e", f"trace={CHANGES}", overwrite=overwrite)
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
    found = trace(make_run(tmp_path / "traced", overwrite=overwrite), log_path, overwrite=overwrite)
    assert len(found) > 10
    outcomes = []
    # A process that is killed at an fsync leaves what one leaves that is killed at the change after it.
    for number, call in enumerate(call for call in found if call.name != "fsync"):
        run_dir = make_run(tmp_path / str(number), overwrite=overwrite)
        status, said = run(run_dir, log_path, *call.injection("signal=SIGKILL"), overwrite=overwrite)
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
        # And then somebody does it again.
        publish_once(run_dir, THIRD, sequence=9, overwrite=True)
        assert version_of(final_dir, THIRD) is THIRD
        assert (run_dir / "hf-latest").readlink().name == "hf-5"
        remove_leftovers(run_dir)  # as the start of every job does
        left = [path.name for path in run_dir.iterdir() if path.name not in ("hf-5", "hf-latest")]
        assert all(name.startswith((".stillframe-probe-", ".hf-latest-")) for name in left), left
    assert outcomes == sorted(outcomes), "once it is published, it stays"
    assert set(outcomes) == {False, True}


@pytest.mark.parametrize("overwrite", [False, True])
def test_where_any_step_fails_it_is_said_and_what_is_there_is_whole(tmp_path: Path, overwrite: bool) -> None:
    log_path = tmp_path / "log"
    found = trace(make_run(tmp_path / "traced", overwrite=overwrite), log_path, overwrite=overwrite)
    told = set()
    for number, call in enumerate(found):
        run_dir = make_run(tmp_path / str(number), overwrite=overwrite)
        status, said = run(run_dir, log_path, *call.injection("error=EIO"), overwrite=overwrite)
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
    lines = [call.line for call in trace(run_dir, tmp_path / "log", overwrite=False)]
    hidden = run_dir / ".hf-5.incomplete"
    steps = [
        ("the hidden directory is made", rf"mkdir\S* ?.*{hidden}\""),
        ("its marker has its content", rf"fsync\(\d+<{hidden}/.stillframe/.attempt"),
        ("and its name", rf"fsync\(\d+<{hidden}/.stillframe>"),
        ("the work directory has its name", rf"fsync\(\d+<{hidden}>"),
        ("the hidden directory has its name", rf"fsync\(\d+<{run_dir}>"),
        ("the config comes when all is proven", r"rename\w*\(.*\.stillframe/config\.json\""),
        ("the manifest has its content", rf"fsync\(\d+<{hidden}/\.stillframe\.json\.tmp"),
        ("the manifest gets its name", r"rename\w*\(.*/\.stillframe\.json\.tmp\""),
        ("which is durable", rf"fsync\(\d+<{hidden}>"),
        ("before the receipts go", r"unlink\w*\(.*attempt-"),
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
