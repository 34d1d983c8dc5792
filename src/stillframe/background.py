"""The saves behind training: written, voted on and published one after the other, on a thread of their own."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stillframe.commit.rendezvous import Rendezvous
from stillframe.commit.vote import Ballot
from stillframe.errors import SaveFailed, StillframeError
from stillframe.names import CHECKPOINT_PART, EXPORT_PART, TOGETHER, published_path
from stillframe.policies import ABORT_STATUS, FailurePolicies
from stillframe.save import SaveJob, run_save
from stillframe.watch.monitor import Monitor
from stillframe.watch.progress import SaveProgress, SaveReport, Tracker
from stillframe.watch.tolerance import Tolerance
from stillframe.writer.client import WriterClient

_log = logging.getLogger("stillframe")
_KEPT_REPORTS = 256
_GOODBYE_TIMEOUT_S = 60.0
_ABORT_TIMEOUT_S = 10.0


class Save:
    """One directory to be: its job, and the futures that end with it, each with the path that it resolves to."""

    def __init__(self, job: SaveJob, tracker: Tracker) -> None:
        self.job = job
        self.tracker = tracker
        inside = (CHECKPOINT_PART, EXPORT_PART) if job.kind == TOGETHER else (".",)
        self.futures = tuple((Future[Path](), job.final_dir / name) for name in inside)
        for future, _ in self.futures:
            future.set_running_or_notify_cancel()  # none can be cancelled, for the other ranks save too

    @property
    def is_over(self) -> bool:
        return all(future.done() for future, _ in self.futures)

    def publish(self) -> None:
        for future, path in self.futures:
            future.set_result(path)

    def fail(self, failure: StillframeError) -> None:
        for future, _ in self.futures:
            if not future.done():
                future.set_exception(failure)


@dataclass(frozen=True, slots=True)
class _InFlight:
    """What one call saves: its directories, one after the other."""

    thread: threading.Thread
    saves: tuple[Save, ...]

    @property
    def tracker(self) -> Tracker:
        """That of the directory that is being made."""
        return next((save.tracker for save in self.saves if not save.is_over), self.saves[-1].tracker)


class Background:
    """One call's saves at a time, with this rank's part in their votes. What fails here is raised by `check`.

    `ballot` is the one of the start; each save, and each vote of the training thread (`next_ballot`), has a successor
    of the one before. `steps` are the published steps of each kind, known on all ranks alike since the last verdict.
    """

    def __init__(self, meeting: Rendezvous, ballot: Ballot, policies: FailurePolicies) -> None:
        self._meeting = meeting
        self.ballot = ballot
        self.steps: Mapping[str, frozenset[int]] = {}
        self._monitor = Monitor()
        self._export_tolerance = Tolerance(policies.exports)
        self._tolerance = Tolerance(policies.checkpoints)
        self._reports: deque[SaveReport] = deque(maxlen=_KEPT_REPORTS)
        self._in_flight: _InFlight | None = None

    def next_ballot(self, step: int | None, path: Path) -> Ballot:
        self.ballot = self.ballot.successor(step=step, path=path)
        return self.ballot

    def forget(self, run_dir: Path, gone: Collection[Path]) -> None:
        """Leave the directories `gone` out of `steps`."""
        self.steps = {
            kind: frozenset(step for step in steps if published_path(run_dir, kind, step) not in gone)
            for kind, steps in self.steps.items()
        }

    def launch(self, saves: Sequence[Save], writer: WriterClient) -> None:
        """Begin with `saves`, whose snapshots are in the arena, and return at once. None may be in flight."""
        thread = threading.Thread(
            target=self._run_all,
            args=(saves, writer),
            name=f"stillframe-save-{saves[0].job.step}",
            daemon=True,  # a training that ends with an exception must not wait for it
        )
        self._in_flight = _InFlight(thread, tuple(saves))
        thread.start()

    def wait(self) -> None:
        """Wait until the save in flight is over, link and retention included; bounded, for each step of a save is."""
        if self._in_flight is not None:
            self._in_flight.thread.join()
            self._in_flight = None

    def finish(self, futures: Sequence[Future[Path]]) -> list[Path]:
        """Wait until the saves are over, and raise what the first of them failed with."""
        try:
            paths = [future.result() for future in futures]
        except StillframeError as error:
            self._monitor.withdraw(error)
            self.wait()
            raise
        self.wait()
        self.check()
        return paths

    def check(self) -> None:
        """Raise the oldest failure that was not raised yet, if there is one."""
        self._monitor.raise_pending()

    @property
    def progress(self) -> SaveProgress | None:
        """How far the save in flight is on this rank; None if there is none."""
        current = self._in_flight
        return current.tracker.progress() if current is not None and current.thread.is_alive() else None

    @property
    def reports(self) -> Sequence[SaveReport]:
        """The published saves, oldest first (at most the last 256)."""
        return tuple(self._reports)

    def wait_briefly(self) -> bool:
        """Wait for the save in flight no longer than other ranks may need, for they may have ended long ago; whether it
        is over then."""
        if self._in_flight is None:
            return True
        self._in_flight.thread.join(_GOODBYE_TIMEOUT_S)
        if self._in_flight.thread.is_alive():
            step = self._in_flight.tracker.progress().step
            _log.error("ending without the save of step %d: not published in %.0f s", step, _GOODBYE_TIMEOUT_S)
            return False
        return True

    def leave(self) -> None:
        """Leave the other ranks; rank 0 waits, at most a minute, until they know the last verdict."""
        if self._meeting.rank == 0 and not self.ballot.await_acknowledged(_GOODBYE_TIMEOUT_S):
            _log.warning("not all ranks asked for the verdict of the last save within %.0f s", _GOODBYE_TIMEOUT_S)
        self._meeting.leave()

    def _run_all(self, saves: Sequence[Save], writer: WriterClient) -> None:
        for save in saves:
            self._run(save, writer)

    def _run(self, save: Save, writer: WriterClient) -> None:
        """One directory: whatever happens here reaches the futures and the monitor."""
        job = save.job

        def on_published() -> None:
            self._reports.append(save.tracker.report(job.final_dir))
            save.publish()

        before = self.ballot
        ballot = self.next_ballot(job.step, job.final_dir)
        try:
            aftermath = run_save(job, ballot, self._meeting, writer, save.tracker, on_published)
            if self._meeting.rank == 0:
                before.forget()  # every rank has voted on this attempt, so each is done with the one before
            self.steps = {kind: frozenset(steps) for kind, steps in aftermath.steps.items()}
            if aftermath.trouble is not None:
                raise aftermath.trouble.exception(step=job.step, path=job.final_dir)
            self._tolerance_of(job).succeeded()
        except BaseException as error:  # noqa: BLE001  # the futures must end, and the user must learn, whatever it is
            failure = error if isinstance(error, StillframeError) else _unexpected(error, job)
            _log.error("%s", failure)
            self._take(failure, job)
            save.fail(failure)

    def _tolerance_of(self, job: SaveJob) -> Tolerance:
        return self._export_tolerance if job.kind == "hf" else self._tolerance

    def _take(self, failure: StillframeError, job: SaveJob) -> None:
        """Do what the user wants done about a failure."""
        tolerance = self._tolerance_of(job)
        action = tolerance.failed()
        if action == "raise":
            self._monitor.report(failure)
        elif action == "continue":
            _log.error("training goes on without the %s of step %d: %s", job.kind, job.step, tolerance.account)
        else:
            self._abort(job)

    def _abort(self, job: SaveJob) -> None:
        """End this process, and no other. The others have the same verdict, and end by it themselves."""
        if self._meeting.rank == 0:
            self.ballot.await_acknowledged(_ABORT_TIMEOUT_S)  # or they would wait for a verdict that is gone
        _log.critical("ending this process with status %d, as on_failure='abort' says", ABORT_STATUS)
        logging.shutdown()  # os._exit flushes nothing of what handlers hold
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(ABORT_STATUS)


def _unexpected(error: BaseException, job: SaveJob) -> SaveFailed:
    reason = f"{type(error).__name__}: {error}"
    failure = SaveFailed(reason, step=job.step, rank=None, stage="vote", path=job.final_dir)
    failure.__cause__ = error
    return failure
