"""Every name that stillframe gives to something in a run directory. Parsed whole or not at all.

<run>/hf-<step>/                     a published Hugging Face export
<run>/checkpoint-<step>/             a published checkpoint to resume from, in the DCP format
<run>/snapshot-<step>/               the same, of which only the newest is kept
<run>/step-<step>/                   an export and a checkpoint published as one: hf/ and checkpoint/ inside
<run>/.<kind>-<step>.incomplete/         one that is being written
<run>/.<kind>-<step>.complete-<attempt>/ one that is whole and gets its final name next
<run>/.<kind>-<step>.retired-<attempt>/  one that is being deleted: superseded, replaced, or given up
<run>/hf-latest, checkpoint-latest, snapshot-latest   relative links to the newest of each
<run>/run.json                       the run's history, derived from the rest
<run>/run.json.damaged               what had that name and was no history
<published>/stillframe.json          the manifest
<published>/.stillframe/             while it is incomplete: its attempt's marker, its plan, the ranks' receipts, and
                                     the files without which nobody loads it
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST_NAME = "stillframe.json"
WORK_DIR_NAME = ".stillframe"
KINDS = ("hf", "checkpoint", "snapshot", "step")
HISTORY_NAME = "run.json"
TRAIN_STATE_NAME = "train_state.json"
TOGETHER = "step"
"""The kind whose directories hold both others, in these parts."""
EXPORT_PART = "hf"
CHECKPOINT_PART = "checkpoint"

_STEP = r"(0|[1-9][0-9]{0,17})"  # not \d, which takes the digits of every script
_KIND = f"({'|'.join(KINDS)})"
_PUBLISHED = re.compile(rf"{_KIND}-{_STEP}")
_ATTEMPT = r"[0-9a-f]{8,64}\.[0-9]{1,9}"
_INCOMPLETE = re.compile(rf"\.{_KIND}-{_STEP}\.incomplete")
_COMPLETE = re.compile(rf"\.{_KIND}-{_STEP}\.complete-({_ATTEMPT})")
_RETIRED = re.compile(rf"\.{_KIND}-{_STEP}\.retired-{_ATTEMPT}")


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


def plan_name() -> str:
    """What the attempt is to become, for whoever finds the directory after a crash."""
    return f"{WORK_DIR_NAME}/plan.json"


def staged_name(name: str) -> str:
    """Where a file is, relative to its incomplete directory, that is held back from its place `name`."""
    return f"{WORK_DIR_NAME}/{name}"


def rank_state_name(rank: int) -> str:
    """The file of a checkpoint that holds what only this rank has: its random state, its position in the data."""
    return f"state/rank-{rank:05d}.pt"


def parse_published(name: str) -> tuple[str, int] | None:
    """`(kind, step)` of a published checkpoint's directory name, None for any other name."""
    match = _PUBLISHED.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def is_attempt(text: str) -> bool:
    """Whether `text` is an attempt's id, so that names may be made of it."""
    return re.fullmatch(_ATTEMPT, text) is not None


def is_retired(name: str) -> bool:
    return _RETIRED.fullmatch(name) is not None


def parse_incomplete(name: str) -> tuple[str, int] | None:
    """`(kind, step)` of the name that a directory has while it is written, None for any other name."""
    match = _INCOMPLETE.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def parse_complete(name: str) -> tuple[str, int, str] | None:
    """`(kind, step, attempt)` of the name that a whole directory has just before its final one, None for any other."""
    match = _COMPLETE.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def is_unicode(name: str) -> bool:
    """Whether `name` can be written as UTF-8: one with lone surrogates cannot, and Python makes such names of bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
