"""The command line without torchrun: help, versions, lists, and one line for what a user can put right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import stillframe
from stillframe.cli import main as cli
from stillframe.cli.listing import format_size
from stillframe.testing import models


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
        (["--help"], ["train", "list", "--version"]),
        (["train", "--help"], ["CONFIG.toml", "--set", "torchrun --nproc-per-node", "docs/trainer.md"]),
        (["list", "--help"], ["RUN_DIR", "published"]),
    ],
)
def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert status_of(*arguments) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)


@pytest.mark.parametrize("arguments", [[], ["sing"], ["train"], ["train", "a.toml", "b.toml"], ["list"]])
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
        name, kind, listed_step, size, unit, ranks, day, time = line.split()
        assert (name, kind, listed_step, ranks) == (f"hf-{step}", "hf", str(step), "1")
        assert (float(size) > 0, unit, len(day), len(time)) == (True, "kB", 10, 8)


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
