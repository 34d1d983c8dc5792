"""Which checkpoints are superseded, and their removal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from stillframe.catalog.directory import FAMILIES, damage, list_checkpoints
from stillframe.durable import remove_tree, retire
from stillframe.errors import OptionError
from stillframe.names import is_retired, retired_path
from stillframe.policies import KeepLast, Retention, RetentionPolicy
from stillframe.records import CatalogEntry

_log = logging.getLogger("stillframe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """A published checkpoint that lost files or bytes after its publication; it supersedes nothing, and stays."""

    entry: CatalogEntry
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Superseded:
    """What retention comes to: `entries` can go, oldest first; `damaged` is what was left out of the reckoning."""

    entries: tuple[CatalogEntry, ...]
    damaged: tuple[Damaged, ...]


def superseded(
    entries: Sequence[CatalogEntry],
    retention: Retention,
    *,
    branch: str,
    now: datetime,
    damage_of: Callable[[CatalogEntry], str | None] = damage,
) -> Superseded:
    """What of `branch` is superseded among `entries`: all checkpoints of the run, oldest publication first.

    There are three families: exports, checkpoints, snapshots. In each the newest stays whatever the policy says, and of
    snapshots nothing else does. A `step-<N>` belongs to exports and to checkpoints, and goes when neither keeps it.

    Nothing goes unless the newest of its family is whole, as `damage_of` tells: one that is not is reported, stays
    where it is, and counts for nothing, so that the last good one is the newest. Raises OptionError if a policy raises.
    """
    own = [entry for entry in entries if entry.branch == branch]
    damaged: list[Damaged] = []
    while True:
        gone, guards = _superseded(own, retention, now)
        found = [Damaged(entry=guard, reason=reason) for guard in guards if (reason := damage_of(guard)) is not None]
        if not found:
            return Superseded(entries=gone, damaged=tuple(damaged))
        damaged += found
        without = {one.entry for one in found}
        own = [entry for entry in own if entry not in without]


def _superseded(
    own: Sequence[CatalogEntry], retention: Retention, now: datetime
) -> tuple[tuple[CatalogEntry, ...], tuple[CatalogEntry, ...]]:
    """What is superseded if all of `own` are whole, and the newest of each family that would lose one by that."""
    rules = {"hf": retention.exports, "checkpoint": retention.checkpoints, "snapshot": KeepLast(1)}
    families = [([entry for entry in own if entry.kind in kinds], rules[family]) for family, kinds in FAMILIES.items()]
    kept: set[CatalogEntry] = set()
    for members, policy in families:
        if members:
            kept |= {members[-1], *_kept(policy, members, now)}
    gone = tuple(entry for entry in own if entry not in kept)
    guards = {members[-1]: None for members, _ in families if not kept.issuperset(members)}
    return gone, tuple(guards)


def _kept(policy: RetentionPolicy, members: Sequence[CatalogEntry], now: datetime) -> frozenset[CatalogEntry]:
    try:
        return frozenset(policy.kept(members, now=now))
    except Exception as error:
        raise OptionError(
            f"the retention policy {policy!r} failed, so nothing is removed: {type(error).__name__}: {error}"
        ) from error


def retain(run_dir: Path, retention: Retention, *, branch: str, now: datetime, attempt: str) -> Superseded:
    """Remove what of `branch` is superseded in `run_dir`; gone from the list, durably, on return.

    Returns what was removed, and what was found damaged, which is logged too. Raises OSError if something could not be
    removed (what follows it stays, and is superseded the next time as well), OptionError if a policy raises.
    """
    result = superseded(list_checkpoints(run_dir), retention, branch=branch, now=now)
    for found in result.damaged:
        _log.error(
            "%s is published, but is not whole any more: %s. What it would have superseded is kept; check the file "
            "system, and delete that directory once you need nothing from it",
            found.entry.path,
            found.reason,
        )
    for entry in result.entries:
        remove(entry, attempt=attempt)
    return result


def remove(entry: CatalogEntry, *, attempt: str) -> None:
    """Delete a published checkpoint: it disappears by one durable rename, then its files go. Raises OSError."""
    retire(entry.path, retired_path(entry.path.parent, entry.kind, entry.step, attempt))


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed runs have left of checkpoints that they were deleting; what cannot be removed stays."""
    for path in run_dir.iterdir():
        if is_retired(path.name) and path.is_dir() and not path.is_symlink():
            try:
                remove_tree(path)
            except OSError as error:
                _log.warning("what is left of a deleted checkpoint cannot be removed: %s", error)
