"""The start of the Checkpointers: every rank sets itself up, and either all have one or all raise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stillframe.catalog.directory import list_checkpoints, next_sequence, point_to_newest, steps_by_kind
from stillframe.catalog.retention import remove_leftovers
from stillframe.commit.failure import Failure
from stillframe.commit.probe import Probe
from stillframe.commit.recover import recover
from stillframe.commit.rendezvous import Rendezvous
from stillframe.commit.vote import Aftermath, Ballot, Vote
from stillframe.errors import StillframeError
from stillframe.names import KINDS
from stillframe.records import Layout, Recovered
from stillframe.sketch import Sketch

_log = logging.getLogger("stillframe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What every rank knows alike from the start on: the published steps of each kind, and what was `recovered`."""

    steps: Mapping[str, frozenset[int]]
    recovered: tuple[Recovered, ...]


def agree_to_start(
    run_dir: Path,
    ballot: Ballot,
    meeting: Rendezvous,
    set_up: Callable[[], Layout],
    begin_history: Callable[[], None] = lambda: None,
    give_up: Callable[[Exception], None] = lambda error: None,
) -> Started:
    """Probe `run_dir`, run `set_up` on this rank; once every rank could do both, recover what ended jobs have left.

    `set_up` returns a layout, whose digest must be the same on all ranks. `begin_history` is the last thing that
    rank 0 does. `give_up` is told what this rank failed with, for those that wait for it in their `set_up`. Blocks
    until all ranks have called this, bounded by the ballot's timeout. Raises on every rank what failed on one, as the
    exception that it was there.
    """
    probe = Probe(run_dir, meeting.nonce)
    own_error: Exception | None = None
    layout: Layout | None = None
    try:
        _begin(probe, ballot, meeting)
        try:
            probe.take_part(meeting.rank)
            layout = set_up()
        except Exception as error:  # noqa: BLE001  # told to all ranks, and raised below
            own_error = error
            give_up(error)
        failure = None if own_error is None else Failure.of(own_error, rank=meeting.rank, stage="start")
        sketch = None if layout is None else layout.sketch
        ballot.cast(
            Vote(
                rank=meeting.rank,
                step=None,
                layout_digest="" if layout is None else layout.digest,
                failure=failure,
                sketch="" if sketch is None else sketch.digits,
            )
        )
        if meeting.rank == 0:
            aftermath = _decide(run_dir, probe, ballot, meeting, sketch, begin_history)
        else:
            ballot.await_verdict()
            aftermath = ballot.await_aftermath()
        steps = {kind: frozenset(published) for kind, published in aftermath.steps.items()}
        return Started(steps=steps, recovered=aftermath.recovered)
    except StillframeError as verdict:
        # On the rank where it failed, the original says more than what came back from the vote.
        if isinstance(own_error, StillframeError) and str(verdict).endswith(str(own_error)):
            raise own_error from None
        raise verdict from own_error
    finally:
        ballot.acknowledge()


def _begin(probe: Probe, ballot: Ballot, meeting: Rendezvous) -> None:
    if meeting.rank != 0:
        ballot.await_open()
        return
    try:
        probe.begin()
    except StillframeError as error:
        ballot.open(Failure.of(error, rank=0, stage="start"))
        raise
    ballot.open(None)


def _decide(
    run_dir: Path,
    probe: Probe,
    ballot: Ballot,
    meeting: Rendezvous,
    sketch: Sketch | None,
    begin_history: Callable[[], None],
) -> Aftermath:
    """Rank 0: collect the votes, end the probe, set the run directory in order, tell everyone."""
    try:
        try:
            ballot.collect(sketch)
            probe.end(meeting.world_size)
        finally:
            probe.remove()
        recovered = recover(run_dir, next_sequence=next_sequence(run_dir))
        _mend_links(run_dir, ballot.attempt)
        remove_leftovers(run_dir)
        steps = steps_by_kind(list_checkpoints(run_dir))
        begin_history()
    except Exception as error:
        failure = Failure.of(error, rank=0, stage="start")
        ballot.decide(failure)
        raise failure.exception(step=None, path=run_dir) from error
    aftermath = Aftermath(trouble=None, steps=steps, recovered=recovered)
    ballot.decide(None)
    ballot.conclude(aftermath)
    return aftermath


def _mend_links(run_dir: Path, attempt: str) -> None:
    """Also of what was not recovered now: a job may have ended between a publication and its link."""
    for kind in KINDS:
        try:
            point_to_newest(run_dir, kind, attempt)
        except OSError as error:
            _log.warning("the link to the newest checkpoint of kind %s cannot be mended: %s", kind, error)
