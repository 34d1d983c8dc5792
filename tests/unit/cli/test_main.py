"""The command line without torchrun: help, versions, lists, and one line for what a user can put right."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import stillframe
from stillframe.cli import main as cli
from stillframe.cli.listing import format_size
from stillframe.testing import models
from tests.unit.catalog.run_directory import PUBLISHED_AT, add_checkpoint


@pytest.fixture(autouse=True)
def _last_value_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line sets it when it reports an error; this process goes on."""
    monkeypatch.setattr(sys, "last_value", None, raising=False)


def status_of(*arguments: str) -> int:
    """The exit status, also where argparse ends the process itself."""
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("--version") == 0
    assert capsys.readouterr().out == f"stillframe {stillframe.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["train", "list", "inspect", "verify", "--version"]),
        (["train", "--help"], ["CONFIG.toml", "--set", "torchrun --nproc-per-node", "docs/trainer.md"]),
        (["list", "--help"], ["RUN_DIR", "published", "--json", "docs/retention.md"]),
        (["inspect", "--help"], ["DIR", "--tensors", "--json", "docs/format.md"]),
        (["verify", "--help"], ["DIR", "checksums", "docs/format.md"]),
    ],
)
def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert status_of(*arguments) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)


@pytest.mark.parametrize(
    "arguments", [[], ["sing"], ["train"], ["train", "a.toml", "b.toml"], ["list"], ["inspect"], ["verify"]]
)
def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert status_of(*arguments) == 2
    assert "usage: stillframe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "{dir}/absent.toml"],
            "stillframe train: error: cannot read the configuration {dir}/absent.toml: No such",
        ),
        (["train", "{dir}/empty.toml"], "stillframe train: error: {dir}/empty.toml: data.files is missing"),
        (["list", "{dir}/absent"], "stillframe list: error: {dir}/absent is not a directory"),
        (["inspect", "{dir}/absent"], "stillframe inspect: error: {dir}/absent: does not exist"),
        (["verify", "{dir}/absent"], "stillframe verify: error: {dir}/absent: does not exist"),
        (["verify", "{dir}"], "stillframe verify: error: {dir}: has no stillframe.json"),
    ],
)
def test_a_user_s_error_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.toml").write_text("")
    assert status_of(*(argument.format(dir=tmp_path) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message.format(dir=tmp_path))
    assert captured.err.count("\n") == 1


def test_list_of_an_empty_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert status_of("list", str(tmp_path)) == 0
    assert capsys.readouterr().out == f"no checkpoints in {tmp_path}\n"


def test_list_of_checkpoints_the_latest_last(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = models.tiny_qwen3()
    with stillframe.Checkpointer(tmp_path / "run", model=model) as checkpointer:
        for step in (12, 3):
            checkpointer.save_hf(step)
    (tmp_path / "run" / "hf-99").mkdir()  # by hand, so no checkpoint
    assert status_of("list", str(tmp_path / "run")) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["CHECKPOINT", "KIND", "STEP", "SIZE", "RANKS", "PUBLISHED"]
    for line, step in zip(lines, (12, 3), strict=True):
        name, kind, listed_step, size, unit, ranks, day, time, zone = line.split()
        assert (name, kind, listed_step, ranks) == (f"hf-{step}", "hf", str(step), "1")
        assert (float(size) > 0, unit, len(day), len(time), len(zone)) == (True, "kB", 10, 8, 5)


def test_verify_has_a_line_for_each_directory_and_status_1_for_damage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with stillframe.Checkpointer(tmp_path, model=models.tiny_qwen3()) as checkpointer:
        first, second = checkpointer.save_hf(1), checkpointer.save_hf(2)
    assert status_of("verify", str(first), str(second)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["whole", str(path)] for path in (first, second)]
    assert re.fullmatch(r"3 files, 35 tensors, \d+\.\d kB", lines[0].split(": ")[2])
    (first / "config.json").write_text("{}")
    assert status_of("verify", str(first), str(second)) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"whole: {second}: ")
    assert captured.err.startswith(
        f"damaged: {first}: 1 of 3 files are not what was published: config.json is truncated"
    )
    assert captured.err.count("\n") == 1


@pytest.fixture
def in_nepal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is 5 hours and 45 minutes ahead of UTC, whatever the machine's is."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "NPT-05:45")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("in_nepal")
def test_list_of_all_kinds_with_local_times(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for sequence, kind in enumerate(("hf", "checkpoint", "step", "snapshot")):
        add_checkpoint(tmp_path, 100 + sequence, sequence=sequence, kind=kind)
    assert status_of("list", str(tmp_path)) == 0
    assert capsys.readouterr().out == (
        "CHECKPOINT      KIND        STEP  SIZE  RANKS  PUBLISHED\n"
        "hf-100          hf          100   2 B   2      2026-01-02 08:49:05 +0545\n"
        "checkpoint-101  checkpoint  101   2 B   2      2026-01-02 08:49:05 +0545\n"
        "step-102        step        102   4 B   2      2026-01-02 08:49:05 +0545\n"
        "snapshot-103    snapshot    103   2 B   2      2026-01-02 08:49:05 +0545\n"
    )


@pytest.mark.usefixtures("in_nepal")
def test_list_shows_branch_and_metrics_where_there_are_any(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 1, sequence=1, metrics={"loss": 1 / 3, "accuracy": 0.5})
    add_checkpoint(tmp_path, 2, sequence=2, branch="second", published_at="9999-12-31T23:59:59+00:00")
    add_checkpoint(tmp_path, 3, sequence=3, branch="\x1b[31mred", metrics={"a\nb": 1e30})
    assert status_of("list", str(tmp_path)) == 0
    assert capsys.readouterr().out == (
        "CHECKPOINT  KIND  STEP  SIZE  RANKS  PUBLISHED                  BRANCH         METRICS\n"
        "hf-1        hf    1     2 B   2      2026-01-02 08:49:05 +0545                 accuracy=0.5 loss=0.333333\n"
        "hf-2        hf    2     2 B   2      unknown                    second\n"
        "hf-3        hf    3     2 B   2      2026-01-02 08:49:05 +0545  '\\x1b[31mred'  'a\\nb'=1e+30\n"
    )


def test_list_for_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_checkpoint(tmp_path, 7, sequence=3, kind="checkpoint", branch="second", metrics={"loss": 0.5})
    monkeypatch.chdir(tmp_path)
    assert status_of("list", ".", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "name": "checkpoint-7",
            "path": str(tmp_path / "checkpoint-7"),
            "kind": "checkpoint",
            "step": 7,
            "branch": "second",
            "sequence": 3,
            "published_at": PUBLISHED_AT,
            "world_size": 2,
            "size_bytes": 2,
            "metrics": {"loss": 0.5},
        }
    ]
    (tmp_path / "empty").mkdir()
    assert status_of("list", "empty", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (123_456_789, "123.5 MB"),
        (61 * 10**9, "61.0 GB"),
        (2e15, "2000.0 TB"),
    ],
)
def test_sizes_are_in_decimal_units(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


def test_another_local_rank_speaks_when_the_first_did_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(cli, "LOCAL_RANK_ZERO_SPEAKS_S", 0.0)
    assert status_of("list", str(tmp_path / "absent")) == 2
    assert capsys.readouterr().err.startswith("[local rank 3] stillframe list: error: ")
