"""Checkpointer: what users hold. It composes the stages; what each does is said where it is done."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from stillframe import provenance
from stillframe.commit.failure import Failure
from stillframe.commit.rendezvous import meet
from stillframe.commit.vote import Ballot
from stillframe.errors import CheckpointExists, ClosedError, OptionError, SaveFailed, StillframeError
from stillframe.export import Export
from stillframe.layout.casting import Cast
from stillframe.layout.huggingface import unwrapped
from stillframe.names import published_path
from stillframe.options import CheckpointerOptions, run_directory
from stillframe.records import InlineFile
from stillframe.save import SaveJob, run_save
from stillframe.start import agree_to_start
from stillframe.watch.monitor import Monitor
from stillframe.watch.progress import SaveProgress, SaveReport, Tracker

_log = logging.getLogger("stillframe")
_KEPT_REPORTS = 256
_GOODBYE_TIMEOUT_S = 60.0
_MAX_STEP = 10**18


@dataclass(frozen=True, slots=True)
class _InFlight:
    thread: threading.Thread
    future: Future[Path]
    tracker: Tracker


class Checkpointer:
    """Saves a model, asynchronously and all or nothing, into `run_dir`.

    Every rank of the job makes one with the same arguments, after `fully_shard` or DDP (the constructor waits for all
    ranks), and then calls the same saves in the same order. No call communicates through a process group. Works without
    torch.distributed too. A context manager: leaving it closes.

    Args:
        run_dir: where checkpoints appear; on a file system that all ranks share. Created if missing.
        model: a transformers PreTrainedModel, plain, in DDP, or sharded with FSDP2. Tensors that are not DTensors count
            as replicated: parameters must be equal on all ranks; of buffers, rank 0's are saved.
        tokenizer: saved into every export; rendered now, once. Anything with `save_pretrained(directory)`.
        processor: likewise, for multimodal models.
        max_shard_size, save_dtype, keep_in_fp32, hf_max_keep, save_timeout_s, store_host: see
            `stillframe.options.CheckpointerOptions`.

    Blocks until the arena (this rank's share of the bytes) is allocated and the writer process runs. Raises, on every
    rank alike: OptionError, RunDirectoryError, LayoutError, or SaveFailed if ranks disagree or do not show up.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        model: nn.Module,
        tokenizer: Any = None,
        processor: Any = None,
        max_shard_size: int | str = "50GB",
        save_dtype: str | torch.dtype | None = None,
        keep_in_fp32: Sequence[str] = (),
        hf_max_keep: int | None = None,
        save_timeout_s: float = 7200.0,
        store_host: str | None = None,
    ) -> None:
        self._options = CheckpointerOptions(
            run_dir=run_directory(run_dir),
            max_shard_size=max_shard_size,
            save_dtype=None if save_dtype is None else str(save_dtype).removeprefix("torch."),
            keep_in_fp32=(keep_in_fp32,) if isinstance(keep_in_fp32, str) else tuple(keep_in_fp32),
            hf_max_keep=hf_max_keep,
            save_timeout_s=save_timeout_s,
            store_host=store_host,
        )
        self._monitor = Monitor()
        self._reports: deque[SaveReport] = deque(maxlen=_KEPT_REPORTS)
        self._in_flight: _InFlight | None = None
        self._launching = threading.Lock()
        self._closed = False
        self._export: Export | None = None
        self._meeting = meet(self._options.run_dir, store_host=store_host, timeout_s=save_timeout_s)
        self._ballot = Ballot(self._meeting, step=None, path=self._options.run_dir, timeout_s=save_timeout_s)
        self._at_exit = _exit_handler(weakref.ref(self))
        companions = tuple(companion for companion in (processor, tokenizer) if companion is not None)
        try:
            started = agree_to_start(
                self._options.run_dir, self._ballot, self._meeting, lambda: self._set_up(model, companions)
            )
            self._steps = started.steps["hf"]
        except BaseException:
            self._release()
            raise
        atexit.register(self._at_exit)

    # Saving

    def async_save_hf(self, step: int, *, overwrite: bool = False) -> Future[Path]:
        """Take a snapshot now, export it in the background as `<run_dir>/hf-<step>`; every rank calls it.

        Blocks while a save before it is in flight, and then for the copy of this rank's share; the weights may change
        as soon as it returns. The future resolves to the path once the export is published: complete, durable, under
        its final name. Raises, before anything is copied, what an earlier save in the background failed with, and
        CheckpointExists if the step is published already (`overwrite=True` replaces it in one step).
        """
        return self._launch(step, overwrite=overwrite)

    def save_hf(self, step: int, *, overwrite: bool = False) -> Path:
        """Export as `async_save_hf` does, the same bytes, and wait until it is over, link and retention included.

        Raises SaveFailed if it was not published, or if what follows publication failed (`stage` tells).
        """
        future = self._launch(step, overwrite=overwrite)
        try:
            path = future.result()
        except StillframeError as error:
            self._monitor.withdraw(error)
            raise
        self._wait_for_in_flight()
        self.check()
        return path

    def check(self) -> None:
        """Raise what a save in the background failed with, if one did and it was not raised yet. Costs nothing."""
        self._monitor.raise_pending()

    @property
    def in_flight(self) -> SaveProgress | None:
        """How far the save in flight is on this rank; None if there is none."""
        current = self._in_flight
        return current.tracker.progress() if current is not None and current.thread.is_alive() else None

    @property
    def reports(self) -> Sequence[SaveReport]:
        """The published saves of this Checkpointer, oldest first (at most the last 256)."""
        return tuple(self._reports)

    @property
    def writer_pid(self) -> int:
        """The id of this rank's writer process, for tools that watch its memory or set its priority."""
        return self._live_export().writer.pid

    def close(self) -> None:
        """Wait for the save in flight, end the writer process, free the arena; then raise a failure not raised yet.

        May be called twice. Rank 0 also waits, at most a minute, until the others know the last save's verdict.
        """
        if self._closed:
            return
        self._wait_for_in_flight()
        self._release()
        self._monitor.raise_pending()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; after an exception without waiting: it reaches the user at once, while a save in flight goes on in the
        writer process (and can be published from there by a later run)."""
        if error is None:
            self.close()
            return
        # The process most likely ends now, and must not wait at its exit either. In one that lives on, the rest is
        # tidied up behind its back.
        atexit.unregister(self._at_exit)
        threading.Thread(target=self._close_behind, name="stillframe-close", daemon=True).start()

    # Behind the calls

    def _set_up(self, model: nn.Module, companions: tuple[Any, ...]) -> str:
        self._versions = provenance.versions()
        self._git_commit = provenance.git_commit() if self._meeting.rank == 0 else None
        self._export = Export(
            unwrapped(model),
            companions=companions,
            max_shard_bytes=self._options.max_shard_bytes,
            cast=_cast(self._options),
            rank=self._meeting.rank,
            world_size=self._meeting.world_size,
        )
        return self._export.layout.digest

    def _live_export(self) -> Export:
        if self._closed or self._export is None:
            raise ClosedError(f"this Checkpointer of {self._options.run_dir} is closed")
        return self._export

    def _launch(self, step: int, *, overwrite: bool) -> Future[Path]:
        if not self._launching.acquire(blocking=False):
            raise SaveFailed(
                "another save is being called right now (from a signal handler, or from another thread); call saves "
                "from the training thread, one after the other",
                step=step,
                rank=self._meeting.rank,
                stage="snapshot",
                path=self._options.run_dir,
            )
        try:
            return self._launch_alone(step, overwrite=overwrite)
        finally:
            self._launching.release()

    def _launch_alone(self, step: int, *, overwrite: bool) -> Future[Path]:
        self._live_export()
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _MAX_STEP:
            raise OptionError(f"step must be an integer from 0 to 10^18 - 1, not {step!r}")
        tracker = Tracker(step)
        self._wait_for_in_flight()
        self._monitor.raise_pending()
        tracker.waited()
        final_dir = published_path(self._options.run_dir, "hf", step)
        if step in self._steps and not overwrite:
            # Known on all ranks alike since the last verdict, so all refuse, and none waits for the others.
            reason = "it exists already; pass overwrite=True to replace it"
            raise CheckpointExists(reason, step=step, rank=None, stage="prepare", path=final_dir)
        export = self._live_export()
        failure: Failure | None = None
        inline_files: tuple[InlineFile, ...] = ()
        try:
            inline_files = export.snapshot()
        except Exception as error:  # noqa: BLE001  # the other ranks must learn of it, or they would wait for this one
            failure = Failure.of(error, rank=self._meeting.rank, stage="snapshot")
            _log.exception("the snapshot for step %d failed on rank %d", step, self._meeting.rank)
        tracker.staged()
        ballot = self._ballot.successor(step=step, path=final_dir)
        job = SaveJob(
            run_dir=self._options.run_dir,
            kind="hf",
            layout=export.layout,
            plan_id=export.plan_id,
            step=step,
            overwrite=overwrite,
            inline_files=inline_files,
            snapshot_failure=failure,
            retention=self._options.retention,
            git_commit=self._git_commit,
            versions=self._versions,
            timeout_s=self._options.save_timeout_s,
        )
        future: Future[Path] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled: the other ranks save too
        thread = threading.Thread(
            target=self._run,
            args=(job, ballot, export, tracker, future),
            name=f"stillframe-save-hf-{step}",
            daemon=True,  # a training that ends with an exception must not wait for it
        )
        self._in_flight = _InFlight(thread, future, tracker)
        thread.start()
        return future

    def _run(self, job: SaveJob, ballot: Ballot, export: Export, tracker: Tracker, future: Future[Path]) -> None:
        """The save's own thread: whatever happens here reaches the future and the monitor."""

        def on_published() -> None:
            self._reports.append(tracker.report(job.final_dir, export.staged_bytes))
            future.set_result(job.final_dir)

        try:
            aftermath = run_save(job, ballot, self._meeting, export.writer, tracker, on_published)
            if self._meeting.rank == 0:
                self._ballot.forget()  # every rank has voted on this attempt, so each is done with the one before
            self._steps = frozenset(aftermath.steps["hf"])
            if aftermath.trouble is not None:
                raise aftermath.trouble.exception(step=job.step, path=job.final_dir)
        except BaseException as error:  # noqa: BLE001  # the future must end, and the user must learn, whatever it is
            failure = error if isinstance(error, StillframeError) else _unexpected(error, job)
            _log.error("%s", failure)
            self._monitor.report(failure)
            if not future.done():
                future.set_exception(failure)
        finally:
            self._ballot = ballot

    def _wait_for_in_flight(self) -> None:
        """Wait until the save in flight is over, link and retention included; bounded, for each step of a save is."""
        if self._in_flight is not None:
            self._in_flight.thread.join()
            self._in_flight = None

    def _release(self) -> None:
        """Give everything back; the last thing that a Checkpointer does."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        try:
            if self._export is not None:
                self._export.close()
        finally:
            if self._meeting.rank == 0 and not self._ballot.await_acknowledged(_GOODBYE_TIMEOUT_S):
                _log.warning("not all ranks asked for the verdict of the last save within %.0f s", _GOODBYE_TIMEOUT_S)
            self._meeting.leave()

    def _close_at_exit(self) -> None:
        """Close, but wait for other ranks no longer than they may need; they may have ended long ago."""
        if self._in_flight is not None:
            self._in_flight.thread.join(_GOODBYE_TIMEOUT_S)
            if self._in_flight.thread.is_alive():
                step = self._in_flight.tracker.progress().step
                _log.error("ending without the save of step %d: not published in %.0f s", step, _GOODBYE_TIMEOUT_S)
                return
        self.close()

    def _close_behind(self) -> None:
        try:
            self.close()
        except StillframeError as error:
            _log.error("while closing after an exception: %s", error)


def _cast(options: CheckpointerOptions) -> Cast | None:
    if options.save_dtype is None:
        return None
    return Cast(
        dtype=getattr(torch, options.save_dtype), keep=tuple(re.compile(pattern) for pattern in options.keep_in_fp32)
    )


def _unexpected(error: BaseException, job: SaveJob) -> SaveFailed:
    reason = f"{type(error).__name__}: {error}"
    failure = SaveFailed(reason, step=job.step, rank=None, stage="vote", path=job.final_dir)
    failure.__cause__ = error
    return failure


def _exit_handler(reference: weakref.ref[Checkpointer]) -> Callable[[], None]:
    owner_pid = os.getpid()

    def close_at_exit() -> None:
        checkpointer = reference()
        if checkpointer is None or os.getpid() != owner_pid:  # a fork inherits this, but neither writer nor store
            return
        # In an interactive session that attribute is just the last error that was shown.
        interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)
        if getattr(sys, "last_value", None) is not None and not interactive:
            _log.warning("ending on an exception: a save that may be in flight is not waited for")
            return
        _log.warning("a Checkpointer was not closed before the interpreter ended; closing it now")
        checkpointer._close_at_exit()

    return close_at_exit
