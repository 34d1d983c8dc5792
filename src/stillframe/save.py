"""One save, from staged to published: what happens in the background, on a thread of its own, on every rank.

rank 0: prepare the directory ─▶ open ─▶ write ─▶ vote ─▶ collect, prove, publish ─▶ verdict ─▶ link, retention
others:                   wait for open ─▶ write ─▶ vote ─▶          wait for the verdict
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from stillframe import names
from stillframe.catalog.directory import list_checkpoints, next_sequence, point_to_newest, steps_by_kind
from stillframe.catalog.history import History
from stillframe.catalog.retention import retain
from stillframe.commit.failure import Failure
from stillframe.commit.plan import AttemptPlan
from stillframe.commit.publish import Publication
from stillframe.commit.rendezvous import Rendezvous
from stillframe.commit.vote import Aftermath, Ballot, Vote
from stillframe.errors import SaveFailed, SaveTimeout, StillframeError, WriteFailed, WriterDied
from stillframe.policies import Retention
from stillframe.records import InlineFile, Layout, WriteRequest
from stillframe.watch.progress import Tracker
from stillframe.writer.client import WriterClient, WriterError

_WRITER_ERRORS: Mapping[str, type[SaveFailed]] = {
    "failed": WriteFailed,
    "died": WriterDied,
    "timeout": SaveTimeout,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """What is saved: captured on the training thread, constant from then on.

    `files` renders the small files that are this rank's to write: on rank 0 all that the layout wants beside its own,
    elsewhere only the rank's one of the layout's `rank_files`, if it has such. `snapshot_failure`: the arena could not
    be filled on this rank, which the other ranks must learn of. `kind` is that of the name: checkpoints and snapshots
    have one layout. `history` is rank 0's pen for `run.json`.
    """

    run_dir: Path
    kind: str
    layout: Layout
    plan_id: int
    step: int
    overwrite: bool
    files: Callable[[], tuple[InlineFile, ...]]
    snapshot_failure: Failure | None
    retention: Retention
    git_commit: str | None
    versions: Mapping[str, str]
    branch: str
    metrics: Mapping[str, float]
    history: History | None
    timeout_s: float

    @property
    def final_dir(self) -> Path:
        return names.published_path(self.run_dir, self.kind, self.step)


def run_save(
    job: SaveJob,
    ballot: Ballot,
    meeting: Rendezvous,
    writer: WriterClient,
    tracker: Tracker,
    on_published: Callable[[], None],
) -> Aftermath:
    """Take this rank's part in the attempt; blocks, bounded by the job's timeout at each step.

    `on_published` is called as soon as this rank knows that the checkpoint is published; the link and retention
    follow. Raises StillframeError, on every rank, if it was not published; nothing of it is visible then. A rank that
    loses touch with rank 0 before the verdict raises too, and cannot know.
    """
    vote: Vote | None = None
    try:
        if meeting.rank == 0:
            publication = _publish(job, ballot, meeting, writer, tracker)
            tracker.published()
            on_published()
            aftermath = _after_publication(job, ballot.attempt, publication)
            ballot.conclude(aftermath)
            return aftermath
        layout_digest = None if job.snapshot_failure is not None else job.layout.digest
        ballot.await_open(layout_digest=layout_digest, sketch=job.layout.sketch)
        vote = _write(job, job.files, ballot.attempt, meeting, writer, tracker)
        ballot.cast(vote)
        ballot.await_verdict()
        tracker.published()
        on_published()
        return ballot.await_aftermath()
    except StillframeError as error:
        if vote is None or vote.failure is None or vote.failure.reason in str(error):
            raise
        # Whatever became of the vote, this rank's own failure is known here for certain, and says more.
        raise vote.failure.exception(step=job.step, path=job.final_dir) from error
    finally:
        ballot.acknowledge()


def _publish(job: SaveJob, ballot: Ballot, meeting: Rendezvous, writer: WriterClient, tracker: Tracker) -> Publication:
    """Rank 0's part up to the verdict, which it has told everyone when this returns or raises."""
    publication = Publication(job.run_dir, _plan(job, ballot.attempt))
    try:
        if job.snapshot_failure is not None:
            raise job.snapshot_failure.exception(step=job.step, path=job.final_dir)
        files = publication.prepare(job.files())
    except Exception as error:  # whatever it is, the other ranks must not be left waiting
        failure = _given_up(publication, error, "prepare")
        ballot.open(failure)
        raise failure.exception(step=job.step, path=job.final_dir) from error
    ballot.open(None, layout_digest=job.layout.digest)
    ballot.cast(_write(job, lambda: files, ballot.attempt, meeting, writer, tracker))
    try:
        ballot.collect(job.layout.sketch)
        proven = publication.prove(publication.receipts())
        publication.publish(proven, sequence=next_sequence(job.run_dir))
    except Exception as error:  # likewise
        failure = _given_up(publication, error, "publish")
        ballot.decide(failure)
        raise failure.exception(step=job.step, path=job.final_dir) from error
    ballot.decide(None)
    return publication


def _given_up(publication: Publication, error: Exception, stage: str) -> Failure:
    failure = Failure.of(error, rank=0, stage=stage)
    try:
        publication.clean_up()
    except OSError as leftover:
        failure = replace(failure, reason=f"{failure.reason}; and what was written could not be removed: {leftover}")
    return failure


def _plan(job: SaveJob, attempt: str) -> AttemptPlan:
    return AttemptPlan(
        kind=job.kind,
        step=job.step,
        attempt=attempt,
        overwrite=job.overwrite,
        layout=job.layout,
        git_commit=job.git_commit,
        versions=job.versions,
        branch=job.branch,
        metrics=job.metrics,
    )


def _after_publication(job: SaveJob, attempt: str, publication: Publication) -> Aftermath:
    """Links to the newest, then retention, then the history. What fails here takes nothing back: it is published."""
    failures = []
    steps = steps_by_kind(())
    stage = "link"
    try:
        point_to_newest(job.run_dir, job.kind, attempt)
        stage = "retention"
        # Not where a link still names an older one: it would dangle if that were removed.
        retain(job.run_dir, job.retention, branch=job.branch, now=datetime.now(UTC), attempt=attempt)
        stage = "history"
        if job.history is not None:
            job.history.published(job.step)
    except (StillframeError, OSError) as error:
        failures.append((stage, error))
    try:
        publication.clean_up()
        steps = steps_by_kind(list_checkpoints(job.run_dir))  # of all kinds: retention may have removed of any
    except (StillframeError, OSError) as error:
        failures.append(("retention", error))
    if not failures:
        return Aftermath(trouble=None, steps=steps)
    reason = "the checkpoint is published, but then: " + "; ".join(str(error) for _, error in failures)
    return Aftermath(trouble=Failure(error="SaveFailed", rank=0, stage=failures[0][0], reason=reason), steps=steps)


def _write(
    job: SaveJob,
    files: Callable[[], tuple[InlineFile, ...]],
    attempt: str,
    meeting: Rendezvous,
    writer: WriterClient,
    tracker: Tracker,
) -> Vote:
    """Have the share and `files` written and return this rank's vote; a failure is a vote too."""
    failure = job.snapshot_failure
    if failure is None:
        try:
            request = WriteRequest(
                plan_id=job.plan_id,
                kind=job.kind,
                step=job.step,
                attempt=attempt,
                directory=names.incomplete_path(job.run_dir, job.kind, job.step),
                marker_name=names.marker_name(attempt),
                receipt_name=names.receipt_name(meeting.rank),
                inline_files=files(),
            )
            writer.write(request, timeout_s=job.timeout_s, on_progress=tracker.wrote)
            tracker.written()
        except WriterError as error:
            cls = _WRITER_ERRORS[error.kind]
            failure = Failure(error=cls.__name__, rank=meeting.rank, stage="write", reason=error.reason)
        except Exception as error:  # noqa: BLE001  # whatever it is, no rank must be left waiting for this vote
            failure = Failure.of(error, rank=meeting.rank, stage="write")
    return Vote(rank=meeting.rank, step=job.step, layout_digest=job.layout.digest, failure=failure)
