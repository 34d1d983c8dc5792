"""Checkpointer: what users hold. It composes the stages; what each does is said where it is done."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from stillframe import provenance
from stillframe.background import Background, Save
from stillframe.catalog.directory import point_to_newest
from stillframe.catalog.history import History
from stillframe.commit.exchange import Exchange
from stillframe.commit.failure import Failure
from stillframe.commit.rendezvous import meet
from stillframe.commit.together import Together
from stillframe.commit.vote import Ballot
from stillframe.errors import (
    CheckpointExists,
    ClosedError,
    OptionError,
    RunDirectoryError,
    SaveFailed,
    StillframeError,
)
from stillframe.export import Export
from stillframe.frames import Frames, What
from stillframe.layout.casting import Cast
from stillframe.layout.renaming import KeyMapping
from stillframe.limits import WriterLimits, with_variables
from stillframe.names import KINDS, TOGETHER, latest_path, published_path
from stillframe.options import CheckpointerOptions, checked_metrics, key_rules, run_directory
from stillframe.policies import OnFailure, RetentionPolicy
from stillframe.records import Layout, Recovered
from stillframe.resumable import Resumable, encode_train_state
from stillframe.resume import ResumeChoice, Resumed, branch_of, published_dir, resume, set_aside
from stillframe.save import SaveJob
from stillframe.start import Started, agree_to_start
from stillframe.state.objects import Stateful, check_stateful
from stillframe.watch.progress import SaveProgress, SaveReport, Tracker
from stillframe.wrappers import unwrapped_module

_log = logging.getLogger("stillframe")
_MAX_STEP = 10**18
_FREEING_TIMEOUT_S = 2.0


class Checkpointer:
    """Saves a training run, asynchronously and all or nothing, into `run_dir`: exports and checkpoints to resume from.

    Every rank of the job makes one with the same arguments, after `fully_shard` or DDP (the constructor waits for all
    ranks), and then calls the same saves in the same order. No call communicates through a process group, but for
    exports in which ranks exchange something: in fp8 where they cut blocks; (without a checkpoint of the same step) of
    tensors that are sharded along a dimension behind the first into short runs; of keys whose conversion computes
    values, or transposes what shards cut; and with `file_naming="per_rank"`. While such a call copies, on its own
    thread, all ranks meet in a group of stillframe's own; one that does not come leaves the others waiting for no
    longer than `save_timeout_s`, or in the middle of an exchange of rows the timeout of their process group. Works
    without torch.distributed too. A context manager: leaving it closes.

    Args:
        run_dir: where checkpoints appear; on a file system that all ranks share. Created if missing. What an earlier
            run wrote whole but could not publish is published now, the rest of what it left is removed (`recovered`).
        model: a transformers PreTrainedModel, plain, in DDP, or sharded with FSDP2; with a `key_mapping`, or with
            `hf_export=False`, any module. Of one with PEFT's adapters (a PeftModel, or `add_adapter`) exports are the
            adapters alone, as PEFT saves them.
            Tensors that are not DTensors count as replicated: parameters must be equal on all ranks; of buffers, rank
            0's are saved.
        optimizer: what checkpoints hold besides the model; one or several. Made from the sharded model's parameters.
        scheduler, dataloader: anything with `state_dict` and `load_state_dict`, such as torch's schedulers and
            torchdata's StatefulDataLoader; saved for each rank. So is the random state of each rank, always.
        stateful: further such objects, by name.
        tokenizer: saved into every export; rendered now, once. Anything with `save_pretrained(directory)`.
        processor: likewise, for multimodal models.
        config: likewise, for a module that is no PreTrainedModel; those have a config of their own.
        All others: see `stillframe.options.CheckpointerOptions`.

    Blocks until the arena (for an export: this rank's share of the model) is allocated and the writer process runs.
    Raises, on every rank alike: OptionError, RunDirectoryError, LayoutError, or SaveFailed if ranks disagree or do not
    show up.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scheduler: Any = None,
        dataloader: Any = None,
        stateful: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        processor: Any = None,
        config: Any = None,
        hf_export: bool = True,
        max_shard_size: int | str = "50GB",
        save_dtype: str | torch.dtype | None = None,
        keep_in_fp32: Sequence[str] = (),
        keep_in_bf16: Sequence[str] = (),
        key_mapping: Mapping[str, str] | None = None,
        layout: str = "transformers",
        file_naming: str = "standard",
        save_frozen: bool = True,
        pipeline: bool = False,
        publish_together: bool = False,
        on_failure: str | OnFailure = "raise",
        on_export_failure: str | OnFailure | None = None,
        hf_max_keep: int | None = None,
        checkpoint_maxkeep: int | None = None,
        keep_hf: RetentionPolicy | None = None,
        keep_checkpoints: RetentionPolicy | None = None,
        writer_limits: WriterLimits | None = None,
        save_timeout_s: float = 7200.0,
        store_host: str | None = None,
    ) -> None:
        self._options = CheckpointerOptions(
            run_dir=run_directory(run_dir),
            hf_export=hf_export,
            max_shard_size=max_shard_size,
            save_dtype=None if save_dtype is None else str(save_dtype).removeprefix("torch."),
            keep_in_fp32=(keep_in_fp32,) if isinstance(keep_in_fp32, str) else tuple(keep_in_fp32),
            keep_in_bf16=(keep_in_bf16,) if isinstance(keep_in_bf16, str) else tuple(keep_in_bf16),
            key_mapping=key_mapping,
            layout=layout,
            file_naming=file_naming,
            save_frozen=save_frozen,
            pipeline=pipeline,
            publish_together=publish_together,
            on_failure=on_failure,
            on_export_failure=on_export_failure,
            hf_max_keep=hf_max_keep,
            checkpoint_maxkeep=checkpoint_maxkeep,
            keep_hf=keep_hf,
            keep_checkpoints=keep_checkpoints,
            writer_limits=with_variables(WriterLimits() if writer_limits is None else writer_limits),
            save_timeout_s=save_timeout_s,
            store_host=store_host,
        )
        optimizers = _optimizers(optimizer)
        named = {"scheduler": scheduler, "dataloader": dataloader}
        own = check_stateful({**{n: o for n, o in named.items() if o is not None}, **_without_names(stateful, named)})
        self._launching = threading.Lock()
        self._closed = False
        self._frames: Frames | None = None
        self._history: History | None = None
        self._branch = ""
        self._meeting = meet(self._options.run_dir, store_host=store_host, timeout_s=save_timeout_s)
        ballot = Ballot(self._meeting, step=None, path=self._options.run_dir, timeout_s=save_timeout_s)
        self._background = Background(self._meeting, ballot, self._options.failure_policies)
        self._exchange = Exchange(self._meeting, run_dir=self._options.run_dir, timeout_s=save_timeout_s)
        self._at_exit = _exit_handler(weakref.ref(self), self._background)
        companions = tuple(companion for companion in (processor, tokenizer) if companion is not None)
        try:
            self._started: Started = agree_to_start(
                self._options.run_dir,
                ballot,
                self._meeting,
                lambda: self._set_up(model, config, companions, optimizers, own),
                self._begin_history,
                self._exchange.excuse if pipeline else lambda error: None,
            )
            self._background.steps = self._started.steps
        except BaseException:
            self._release()
            raise
        atexit.register(self._at_exit)

    # Saving

    def async_save_hf(
        self, step: int, *, metrics: Mapping[str, float] | None = None, overwrite: bool = False
    ) -> Future[Path]:
        """Take a snapshot now, export it in the background as `<run_dir>/hf-<step>`; every rank calls it.

        Blocks while a save before it is in flight, and then for the copy of this rank's share; the weights may change
        as soon as it returns. The future resolves to the path once the export is published: complete, durable, under
        its final name. `metrics` go into the manifest; retention may go by them. Raises, before anything is copied,
        what an earlier save in the background failed with, and CheckpointExists if the step is published already
        (`overwrite=True` replaces it in one step).
        """
        return self._launch("hf", ("hf",), step, None, metrics, overwrite)[0]

    def save_hf(self, step: int, *, metrics: Mapping[str, float] | None = None, overwrite: bool = False) -> Path:
        """Export as `async_save_hf` does, the same bytes, and wait until it is over, link and retention included.

        Raises SaveFailed if it was not published, or if what follows publication failed (`stage` tells).
        """
        return self._background.finish(self._launch("hf", ("hf",), step, None, metrics, overwrite))[0]

    def async_save(
        self,
        step: int,
        *,
        train_state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        snapshot: bool = False,
        overwrite: bool = False,
    ) -> Future[Path]:
        """Take a snapshot of everything that the run needs to go on, write it in the background as
        `<run_dir>/checkpoint-<step>`, in the DCP format; every rank calls it.

        Model and optimizers, the states of scheduler, dataloader and `stateful` objects and the random state of every
        rank, and `train_state`: whatever JSON holds of epochs, tokens and so on; rank 0's is saved. `snapshot=True`
        names it `snapshot-<step>`, of which only the newest is kept.

        Blocks, resolves and raises as `async_save_hf` does. The first save after the optimizer got its state also lays
        it out and makes the arena larger, unless `prepare` was called.
        """
        kinds = ("snapshot" if snapshot else "checkpoint",)
        return self._launch("checkpoint", kinds, step, train_state, metrics, overwrite)[0]

    def save(
        self,
        step: int,
        *,
        train_state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        snapshot: bool = False,
        overwrite: bool = False,
    ) -> Path:
        """Save as `async_save` does, the same bytes, and wait until it is over, link and retention included."""
        kinds = ("snapshot" if snapshot else "checkpoint",)
        return self._background.finish(self._launch("checkpoint", kinds, step, train_state, metrics, overwrite))[0]

    def async_save_both(
        self,
        step: int,
        *,
        train_state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        snapshot: bool = False,
        overwrite: bool = False,
    ) -> tuple[Future[Path], Future[Path]]:
        """Save a checkpoint and an export of the same step; returns their futures, in this order.

        What both need in the same dtype is copied once. They are written and published one after the other, the
        checkpoint first, and one may fail without the other. With the option `publish_together` both lie in one
        directory, `<run_dir>/step-<step>/checkpoint` and `hf`, published by one rename: both or neither. A snapshot
        and an export are two directories always.
        """
        as_one = self._options.publish_together and not snapshot
        what: What = "step" if as_one else "both"
        kinds = (TOGETHER,) if as_one else ("snapshot" if snapshot else "checkpoint", "hf")
        checkpoint, export = self._launch(what, kinds, step, train_state, metrics, overwrite)
        return checkpoint, export

    def save_both(
        self,
        step: int,
        *,
        train_state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        snapshot: bool = False,
        overwrite: bool = False,
    ) -> tuple[Path, Path]:
        """Save as `async_save_both` does, and wait until both are over; returns both paths, the checkpoint's first."""
        futures = self.async_save_both(
            step, train_state=train_state, metrics=metrics, snapshot=snapshot, overwrite=overwrite
        )
        checkpoint, export = self._background.finish(futures)
        return checkpoint, export

    def prepare(self, *, both: bool = False) -> None:
        """Do now what the first checkpoint (with `both`: also the first `async_save_both`) would do before it copies:
        lay it out, enlarge the arena.

        Call it once the optimizer has its state, after the first step; `resume` does it for checkpoints. Each rank does
        its own part, without the others; with `pipeline=True` every rank calls it, and they tell each other what they
        hold. Blocks while a save is in flight. Raises LayoutError or StillframeError.
        """
        frames = self._live_frames()
        whats: list[What] = ["checkpoint"]
        if both:
            whats.append("step" if self._options.publish_together else "both")
        for what in whats:
            frames.refuse_unplanned(what)
        self._background.wait()
        for what in whats:
            frames.meet(what)
            frames.prepare(what)

    # Going on

    def resume(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        fallback: bool = False,
        skip: Collection[str] = (),
        reset: Collection[str] = (),
        verify: bool = True,
    ) -> Resumed | None:
        """Put the newest checkpoint or snapshot of the run back into model, optimizers and all other objects.

        Every rank calls it, before the first step; it blocks until all have loaded, and either all have or all raise.
        Returns where to go on, or None if there is nothing to resume from; nothing has changed then. Each rank reads
        its own bytes, whatever number and kind of ranks saved them, bit for bit.

        Args:
            path: a directory to resume from instead: a checkpoint of this or another run, or one that
                `torch.distributed.checkpoint.save` wrote of `{"model": ..., "optimizer": ...}`. An older one of this
                run starts a new branch: later ones are left alone, by retention too, and their steps cannot be saved
                again.
            fallback: if the newest is damaged, say so loudly and take the next older one, and so on. Without it that
                is an error: training would otherwise go back without anybody having decided it.
            skip: parts that are not loaded: "optimizer", "optimizer_arguments" (lr, betas, ...), "scheduler",
                "dataloader", "rng", or names of `stateful`.
            reset: such parts that may stay as they are where the number of ranks has changed and they cannot be divided
                anew, such as "rng".
            verify: compare the CRC of everything that is read.

        Raises NotACheckpoint, CorruptCheckpoint (which file and key) or ModelMismatch (all differences at once; before
        anything is changed), with the rank that found it. After CorruptCheckpoint the model may be partly loaded.
        """
        frames = self._live_frames()
        self._background.wait()
        self._background.check()
        choice = ResumeChoice(
            run_dir=self._options.run_dir,
            path=None if path is None else Path(path),
            fallback=fallback,
            skip=frozenset([skip] if isinstance(skip, str) else skip),
            reset=frozenset([reset] if isinstance(reset, str) else reset),
            verify=verify,
        )
        frames.meet("checkpoint")
        resumed = resume(choice, frames.resumable, self._background.next_ballot, self._meeting, self._go_on_from)
        if resumed is not None:
            self._background.forget(choice.run_dir, resumed.passed_over)
            frames.meet("checkpoint")
            frames.prepare("checkpoint")  # now that the optimizer has its state, before training begins
        return resumed

    @property
    def recovered(self) -> Sequence[Recovered]:
        """What the constructor found of runs that died before they published it, and what it did with that."""
        return self._started.recovered

    def check(self) -> None:
        """Raise what a save in the background failed with, if one did and it was not raised yet. Costs nothing."""
        self._background.check()

    @property
    def in_flight(self) -> SaveProgress | None:
        """How far the save in flight is on this rank; None if there is none."""
        return self._background.progress

    @property
    def reports(self) -> Sequence[SaveReport]:
        """The published saves of this Checkpointer, oldest first (at most the last 256)."""
        return self._background.reports

    @property
    def writer_pid(self) -> int:
        """The id of this rank's writer process, for tools that watch its memory or set its priority."""
        return self._live_frames().writer.pid

    def wait(self) -> None:
        """Wait until the save in flight is over, if there is one; what it failed with is raised by the next call."""
        self._background.wait()

    def close(self) -> None:
        """Wait for the save in flight, end the writer process, free the arena; then raise a failure not raised yet.

        May be called twice. Rank 0 also waits, at most a minute, until the others know the last save's verdict.
        """
        if self._closed:
            return
        self._background.wait()
        self._release()
        self._background.check()
        if self._history is not None:
            try:
                self._history.end()
            except (OSError, StillframeError) as error:
                raise RunDirectoryError(f"the run's history cannot be ended: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; after an exception without waiting: it reaches the user at once, while a save in flight goes on in the
        writer process (and is published from there by a later run)."""
        if error is None:
            self.close()
            return
        # The process most likely ends now, and must not wait at its exit either. In one that lives on, the rest is
        # tidied up behind its back.
        atexit.unregister(self._at_exit)
        freeing = threading.Lock()
        # A daemon thread that Python ends inside of torch, before 3.14, takes the process with it (SIGABRT): see
        # `commit.calls`. Once this has the lock, the thread does not begin any more.
        atexit.register(freeing.acquire, timeout=_FREEING_TIMEOUT_S)
        threading.Thread(target=self._close_behind, args=(freeing,), name="stillframe-close", daemon=True).start()

    def act_together(self, *, timeout_s: float, on_called: Callable[[str], None]) -> Together:
        """What `stillframe.Preemption` is made of: the ranks of this Checkpointer agree on one step. Every rank calls
        it, as often as the others; it waits for none of them. Raises ClosedError, SaveFailed."""
        self._live_frames()
        return Together(self._meeting, path=self._options.run_dir, timeout_s=timeout_s, on_called=on_called)

    # Behind the calls

    def _set_up(
        self,
        model: nn.Module,
        config: Any,
        companions: tuple[Any, ...],
        optimizers: tuple[Optimizer, ...],
        own: Mapping[str, Stateful],
    ) -> Layout:
        rank, world_size = self._meeting.rank, self._meeting.world_size
        self._versions = provenance.versions()
        self._git_commit = provenance.git_commit() if rank == 0 else None
        exchange = self._exchange if self._options.pipeline else None
        export = None
        if self._options.hf_export:
            rules = key_rules(self._options.key_mapping)
            export = Export(
                model,
                config=config,
                companions=companions,
                key_mapping=None if rules is None else KeyMapping(rules=rules),
                hub_layout=self._options.layout == "hub",
                per_rank=self._options.file_naming == "per_rank",
                max_shard_bytes=self._options.max_shard_bytes,
                cast=_cast(self._options),
                rank=rank,
                world_size=world_size,
                exchange=exchange,
            )
        resumable = Resumable(
            unwrapped_module(model),
            optimizers=optimizers,
            stateful=own,
            save_frozen=self._options.save_frozen,
            rank=rank,
            world_size=world_size,
            exchange=exchange,
        )
        self._frames = Frames(
            export,
            resumable,
            rank=rank,
            world_size=world_size,
            timeout_s=self._options.save_timeout_s,
            limits=self._options.writer_limits,
        )
        return self._frames.layout

    def _begin_history(self) -> None:
        """Rank 0, once every rank has started: the launch in `run.json`, and the branch that it goes on with."""
        self._branch = branch_of(self._options.run_dir, None)
        self._history = History(self._options.run_dir)
        self._history.begin(
            world_size=self._meeting.world_size,
            versions=self._versions,
            git_commit=self._git_commit,
            git_diff=provenance.git_diff(),
        )

    def _go_on_from(self, resumed: Resumed, damaged: Sequence[Path]) -> None:
        """Rank 0, once every rank has loaded: what that means for the run directory."""
        assert self._history is not None, "rank 0 began it at the start"
        self._branch = branch_of(self._options.run_dir, resumed.path, damaged)
        set_aside(damaged, self._background.ballot.attempt)
        for kind in KINDS if damaged else ():
            point_to_newest(self._options.run_dir, kind, self._background.ballot.attempt)
            link = latest_path(self._options.run_dir, kind)
            if link.is_symlink() and not link.exists():
                link.unlink()  # there is none of the kind any more
        origin = published_dir(resumed.path.resolve()).name
        self._history.resumed(origin, step=resumed.step or 0, branch=self._branch)

    def _live_frames(self) -> Frames:
        if self._closed or self._frames is None:
            raise ClosedError(f"this Checkpointer of {self._options.run_dir} is closed")
        return self._frames

    def _launch(
        self,
        what: What,
        kinds: Sequence[str],
        step: int,
        train_state: Mapping[str, Any] | None,
        metrics: Mapping[str, float] | None,
        overwrite: bool,
    ) -> tuple[Future[Path], ...]:
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
            self._live_frames().refuse_unplanned(what)
            if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _MAX_STEP:
                raise OptionError(f"step must be an integer from 0 to 10^18 - 1, not {step!r}")
            return self._launch_alone(what, kinds, step, train_state, metrics, overwrite)
        finally:
            self._launching.release()

    def _launch_alone(
        self,
        what: What,
        kinds: Sequence[str],
        step: int,
        train_state: Mapping[str, Any] | None,
        metrics: Mapping[str, float] | None,
        overwrite: bool,
    ) -> tuple[Future[Path], ...]:
        trackers = [Tracker(kind, step) for kind in kinds]
        self._background.wait()
        self._background.check()
        for kind, tracker in zip(kinds, trackers, strict=True):
            tracker.waited()
            if step in self._background.steps[kind] and not overwrite:
                # Known on all ranks alike since the last verdict, so all refuse, and none waits for the others.
                reason = "it exists already; pass overwrite=True to replace it"
                final_dir = published_path(self._options.run_dir, kind, step)
                raise CheckpointExists(reason, step=step, rank=None, stage="prepare", path=final_dir)
        frames = self._live_frames()
        failure: Failure | None = None
        checked: dict[str, float] = {}
        try:
            frames.meet(what, again=False)
            state = b""
            if self._meeting.rank == 0:  # whose are saved
                state, checked = encode_train_state(step, train_state), checked_metrics(metrics)
            parts = frames.take(what, train_state=state)
        except Exception as error:  # noqa: BLE001  # the other ranks must learn of it, or they would wait for this one
            failure = Failure.of(error, rank=self._meeting.rank, stage="snapshot")
            parts = frames.without_content(what)
            _log.exception("the snapshot for step %d failed on rank %d", step, self._meeting.rank)
        saves = []
        for kind, part, tracker in zip(kinds, parts, trackers, strict=True):
            tracker.staged(part.staged_bytes)
            job = SaveJob(
                run_dir=self._options.run_dir,
                kind=kind,
                layout=part.layout,
                plan_id=part.plan_id,
                step=step,
                overwrite=overwrite,
                files=part.files,
                snapshot_failure=failure,
                retention=self._options.retention,
                git_commit=self._git_commit,
                versions=self._versions,
                branch=self._branch,
                metrics=checked,
                history=self._history,
                timeout_s=self._options.save_timeout_s,
            )
            saves.append(Save(job, tracker))
        self._background.launch(saves, frames.writer)
        return tuple(future for save in saves for future, _ in save.futures)

    def _release(self) -> None:
        """Give everything back; the last thing that a Checkpointer does."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        try:
            if self._frames is not None:
                self._frames.close()
        finally:
            self._background.leave()

    def _close_at_exit(self) -> None:
        """Close, but wait for other ranks no longer than they may need; they may have ended long ago."""
        if self._background.wait_briefly():
            self.close()

    def _close_behind(self, freeing: threading.Lock) -> None:
        try:
            self._background.wait()
            with freeing:
                if self._frames is not None:
                    self._frames.close()
            self.close()
        except (StillframeError, OSError) as error:  # OSError: the interpreter has ended, and closed what is used here
            _log.error("while closing after an exception: %s", error)


def _optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    found = () if optimizer is None else (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    strange = [type(o).__name__ for o in found if not isinstance(o, Optimizer)]
    if strange:
        raise OptionError(f"optimizer must be a torch.optim.Optimizer or several, not {', '.join(strange)}")
    return found


def _without_names(stateful: Mapping[str, Any] | None, taken: Collection[str]) -> Mapping[str, Any]:
    clash = sorted(set(stateful or {}) & {*taken, "optimizer", "optimizer_arguments"})
    if clash:
        raise OptionError(f"stateful: the names {', '.join(clash)} are taken by arguments of their own")
    return stateful or {}


def _cast(options: CheckpointerOptions) -> Cast | None:
    if options.save_dtype is None:
        return None
    is_fp8 = options.save_dtype == "fp8"
    return Cast(
        dtype=torch.bfloat16 if is_fp8 else getattr(torch, options.save_dtype),
        keep=tuple(re.compile(pattern) for pattern in options.keep_in_fp32),
        fp8_but=tuple(re.compile(pattern) for pattern in options.keep_in_bf16) if is_fp8 else None,
    )


def _exit_handler(reference: weakref.ref[Checkpointer], background: Background) -> Callable[[], None]:
    """What ends a Checkpointer that nobody closed. It holds what a save in flight needs, and not the model: that may go
    once nobody else has the Checkpointer, as when the function returns that made it."""
    owner_pid = os.getpid()

    def close_at_exit() -> None:
        checkpointer = reference()
        if os.getpid() != owner_pid:  # a fork inherits this, but neither writer nor store
            return
        # In an interactive session that attribute is just the last error that was shown.
        interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)
        if getattr(sys, "last_value", None) is not None and not interactive:
            _log.warning("ending on an exception: a save that may be in flight is not waited for")
            return
        _log.warning("a Checkpointer was not closed before the interpreter ended; closing it now")
        if checkpointer is not None:
            checkpointer._close_at_exit()
        elif background.wait_briefly():
            background.leave()
            background.check()

    return close_at_exit
