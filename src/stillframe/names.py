"""Every name that stillframe gives to something in a run directory. Parsed whole or not at all.

<run>/hf-<step>/                     a published Hugging Face export
<run>/.hf-<step>.incomplete/         one that is being written
<run>/.hf-<step>.complete-<attempt>/ one that is whole and gets its final name next
<run>/.hf-<step>.retired-<attempt>/  one that is being deleted: superseded, replaced, or given up
<run>/hf-latest                      a relative link to the newest export
<checkpoint>/stillframe.json         the manifest
<checkpoint>/.stillframe/            while it is incomplete: its attempt's marker, the ranks' receipts, config.json
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST_NAME = "stillframe.json"
WORK_DIR_NAME = ".stillframe"
KINDS = ("hf",)

_STEP = r"(0|[1-9][0-9]{0,17})"  # not \d, which takes the digits of every script
_KIND = f"({'|'.join(KINDS)})"
_PUBLISHED = re.compile(rf"{_KIND}-{_STEP}")
_COMPLETE = re.compile(rf"\.{_KIND}-{_STEP}\.complete-[0-9a-f]{{8,64}}\.[0-9]{{1,9}}")
_RETIRED = re.compile(rf"\.{_KIND}-{_STEP}\.retired-[0-9a-f]{{8,64}}\.[0-9]{{1,9}}")


def published_path(run_dir: Path, kind: str, step: int) -> Path:
    return run_dir / f"{kind}-{step}"


def incomplete_path(run_dir: Path, kind: str, step: int) -> Path:
    return run_dir / f".{kind}-{step}.incomplete"


def complete_path(run_dir: Path, kind: str, step: int, attempt: str) -> Path:
    return run_dir / f".{kind}-{step}.complete-{attempt}"


def retired_path(run_dir: Path, kind: str, step: int, attempt: str) -> Path:
    return run_dir / f".{kind}-{step}.retired-{attempt}"


def latest_path(run_dir: Path, kind: str) -> Path:
    return run_dir / f"{kind}-latest"


def marker_name(attempt: str) -> str:
    """The file, relative to an incomplete directory, by which a writer knows that the directory is its attempt's."""
    return f"{WORK_DIR_NAME}/attempt-{attempt}"


def receipt_name(rank: int) -> str:
    return f"{WORK_DIR_NAME}/receipt-{rank:05d}.json"


def parse_published(name: str) -> tuple[str, int] | None:
    """`(kind, step)` of a published checkpoint's directory name, None for any other name."""
    match = _PUBLISHED.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def is_retired(name: str) -> bool:
    return _RETIRED.fullmatch(name) is not None


def parse_complete(name: str) -> tuple[str, int] | None:
    """`(kind, step)` of the name that a whole directory has just before its final one, None for any other name."""
    match = _COMPLETE.fullmatch(name)
    return (match[1], int(match[2])) if match else None
