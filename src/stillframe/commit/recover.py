"""What a job that ended has left unpublished: published if all of it was written, else removed.

A hidden directory tells what it is without its job. One that has a manifest was proven whole before. One in which all
ranks have left their receipts is proven now, from its plan, by the code that a live rank 0 runs. How far the job's own
processes came does not matter: each step of a publication can be done twice, and so can each step in here.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from stillframe import names
from stillframe.commit.hidden import HiddenDirectory
from stillframe.commit.plan import decode_plan
from stillframe.commit.proof import Doubt, prove_on_disk
from stillframe.commit.publish import Publication
from stillframe.errors import CorruptCheckpoint, LoadError, NotACheckpoint, SaveFailed
from stillframe.manifest import Manifest, read_manifest
from stillframe.records import Recovered

_log = logging.getLogger("stillframe")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A hidden directory by its name; `attempt` is in the names of those that were about to get their final one."""

    path: Path
    kind: str
    step: int
    attempt: str | None


class _Left(Exception):
    """It must stay where it is; the text says why."""


class _Removable(Exception):
    """It is an attempt's, and will never be a checkpoint; the text says why."""


def recover(run_dir: Path, *, next_sequence: int) -> tuple[Recovered, ...]:
    """Publish or remove every hidden directory in `run_dir`, in the order of their steps; durable on return.

    Those published get sequences from `next_sequence` on. For the start of a job, on rank 0 alone: what another job
    is writing there would be removed. What one directory holds never raises; it is logged and returned. Raises OSError
    if `run_dir` cannot be read.
    """
    done = []
    for found in _hidden_directories(run_dir):
        result = _settle(run_dir, found, next_sequence)
        _log.warning("%s, left by a job that ended, is %s: %s", result.path, result.action, result.reason)
        if result.action == "published":
            next_sequence += 1
        done.append(result)
    return tuple(done)


def _hidden_directories(run_dir: Path) -> list[_Found]:
    """By step; of one step, those that are known to be whole come first."""
    found = []
    for path in run_dir.iterdir():
        if path.is_symlink() or not path.is_dir():
            continue
        if (complete := names.parse_complete(path.name)) is not None:
            kind, step, attempt = complete
            found.append(_Found(path=path, kind=kind, step=step, attempt=attempt))
        elif (incomplete := names.parse_incomplete(path.name)) is not None:
            found.append(_Found(path=path, kind=incomplete[0], step=incomplete[1], attempt=None))
    return sorted(found, key=lambda f: (f.step, f.kind, f.attempt is None, f.attempt or ""))


def _settle(run_dir: Path, found: _Found, sequence: int) -> Recovered:
    result = Recovered(path=found.path, kind=found.kind, step=found.step, action="left", reason="")
    hidden = HiddenDirectory(run_dir, kind=found.kind, step=found.step)
    try:
        hidden.open(found.path)
        try:
            return replace(result, action="published", reason=_publish(run_dir, found, hidden, sequence))
        except _Removable as why:
            hidden.retire()
            return replace(result, action="removed", reason=str(why))
    except (_Left, SaveFailed) as why:
        return replace(result, reason=why.reason if isinstance(why, SaveFailed) else str(why))
    except OSError as error:
        # It may be whole, and the next start may be luckier.
        return replace(result, reason=f"{type(error).__name__}: {error}")
    finally:
        hidden.close()


def _publish(run_dir: Path, found: _Found, hidden: HiddenDirectory, sequence: int) -> str:
    """Publish it if it is whole, and return how that is known."""
    manifest = _manifest(found, hidden.inside)
    _refuse_foreign(found, hidden.inside, manifest)
    if manifest is not None and found.attempt not in (None, manifest.attempt):
        # The two were exchanged. Whatever has become of the new version since, this one was to go.
        raise _Removable(f"it is what attempt {found.attempt} has replaced")
    if os.path.lexists(hidden.final_dir):
        hidden.refuse_existing(overwrite=True)  # something foreign has the name
        raise _Removable(f"{hidden.final_dir.name} is published")
    try:
        if manifest is not None:
            _prove_again(manifest, hidden.inside)
            hidden.seal(replace(manifest, sequence=sequence))
            hidden.publish(manifest.attempt, overwrite=False)
            return "it had been proven whole"
    except Doubt as doubt:
        # After a loss of power the manifest may be there before what was moved just before it.
        if not os.path.lexists(hidden.inside / names.plan_name()):
            raise _Removable(f"it is not whole: {doubt}") from doubt
    _publish_by_plan(run_dir, found, hidden, sequence)
    return "all ranks had written their shares"


def _manifest(found: _Found, inside: Path) -> Manifest | None:
    """Its manifest, if there is one of that kind and step."""
    if (inside / names.MANIFEST_NAME).is_symlink():
        return None
    try:
        manifest = read_manifest(inside)
    except (NotACheckpoint, CorruptCheckpoint):
        return None
    except LoadError as error:
        raise _Left(f"its manifest cannot be read: {error.__cause__}") from error
    is_its_own = (manifest.kind, manifest.step) == (found.kind, found.step) and names.is_attempt(manifest.attempt)
    return manifest if is_its_own else None


def _refuse_foreign(found: _Found, inside: Path, manifest: Manifest | None) -> None:
    """Whatever is removed must be an attempt's: it has a manifest or its work directory, or is just made."""
    if manifest is not None:
        return
    if found.attempt is not None:
        raise _Left("it has no valid manifest, so it is not a checkpoint that was about to be published")
    work_dir = inside / names.WORK_DIR_NAME
    if any(inside.iterdir()) and (work_dir.is_symlink() or not work_dir.is_dir()):
        raise _Left("it was not made by a save")


def _prove_again(manifest: Manifest, inside: Path) -> None:
    """Raises Doubt where a file has not the size that the manifest has proven."""
    for name, entry in manifest.files.items():
        prove_on_disk(inside, name, entry.size)


def _publish_by_plan(run_dir: Path, found: _Found, hidden: HiddenDirectory, sequence: int) -> None:
    try:
        content = (hidden.inside / names.plan_name()).read_bytes()
        plan = decode_plan(content)
    except FileNotFoundError as error:
        raise _Removable("it is not whole: rank 0 has not written its plan") from error
    except ValueError as error:
        raise _Removable(f"it is not whole: {error}") from error
    if (plan.kind, plan.step) != (found.kind, found.step) or not names.is_attempt(plan.attempt):
        raise _Removable(f"it is not whole: its plan is that of {plan.kind} step {plan.step}, {plan.attempt!r:.80}")
    # What is published stays, whatever was to become of it.
    publication = Publication(run_dir, replace(plan, overwrite=False), hidden=hidden, plan_content=content)
    try:
        receipts = publication.receipts()
    except SaveFailed as failure:
        raise _Removable(f"it is not whole: of rank {failure.rank}, {failure.reason}") from failure
    try:
        proven = publication.prove(receipts)
    except SaveFailed as failure:
        raise _Removable(f"it is not whole: {failure.reason}") from failure
    publication.publish(proven, sequence=sequence)
