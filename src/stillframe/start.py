"""The start of the Checkpointers: every rank sets itself up, and either all have one or all raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stillframe.catalog.directory import list_checkpoints
from stillframe.catalog.retention import remove_leftovers
from stillframe.commit.failure import Failure
from stillframe.commit.probe import Probe
from stillframe.commit.rendezvous import Rendezvous
from stillframe.commit.vote import Aftermath, Ballot, Vote
from stillframe.errors import StillframeError


def agree_to_start(run_dir: Path, ballot: Ballot, meeting: Rendezvous, set_up: Callable[[], str]) -> frozenset[int]:
    """Probe `run_dir`, run `set_up` on this rank, and return the published steps once every rank could do both.

    `set_up` returns the layout's digest, which must be the same on all ranks. Blocks until all ranks have called this,
    bounded by the ballot's timeout. Raises on every rank what failed on one, as the exception that it was there.
    """
    probe = Probe(run_dir, meeting.nonce)
    own_error: Exception | None = None
    digest = ""
    try:
        _begin(probe, ballot, meeting)
        try:
            probe.take_part(meeting.rank)
            digest = set_up()
        except Exception as error:  # noqa: BLE001  # told to all ranks, and raised below
            own_error = error
        failure = None if own_error is None else Failure.of(own_error, rank=meeting.rank, stage="start")
        ballot.cast(Vote(rank=meeting.rank, step=None, layout_digest=digest, failure=failure))
        if meeting.rank == 0:
            return frozenset(_decide(run_dir, probe, ballot, meeting))
        ballot.await_verdict()
        return frozenset(ballot.await_aftermath().steps)
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


def _decide(run_dir: Path, probe: Probe, ballot: Ballot, meeting: Rendezvous) -> tuple[int, ...]:
    """Rank 0: collect the votes, end the probe, tell everyone; returns the published steps."""
    try:
        try:
            ballot.collect()
            probe.end(meeting.world_size)
        finally:
            probe.remove()
        remove_leftovers(run_dir)
        steps = tuple(entry.step for entry in list_checkpoints(run_dir, "hf"))
    except Exception as error:
        failure = Failure.of(error, rank=0, stage="start")
        ballot.decide(failure)
        raise failure.exception(step=None, path=run_dir) from error
    ballot.decide(None)
    ballot.conclude(Aftermath(trouble=None, steps=steps))
    return steps
