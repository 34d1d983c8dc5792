"""The saves of a run, of every kind: which are due when, and what follows once each is published."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillframe.checkpointer import Checkpointer
from stillframe.errors import SaveFailed
from stillframe.names import TOGETHER
from stillframe.train.config import TrainConfig
from stillframe.train.hooks import Hook
from stillframe.train.progress import Progress, SaveMetrics

Kind = Literal["hf", "checkpoint", "snapshot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    kind: Kind
    step: int
    epoch: int
    future: Future[Path]


class Saves:
    """Launches exports, checkpoints and snapshots, and delivers each to the progress and the hooks once published.

    All ranks call the same methods at the same steps, so that hooks run at the same step everywhere. With `overwrite`,
    a save replaces one of its step that is there already: what a run left behind that this one goes on from.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: TrainConfig,
        hooks: Sequence[Hook],
        progress: Progress,
        *,
        total_steps: int,
        total_epochs: int,
        overwrite: bool,
    ) -> None:
        self._checkpointer = checkpointer
        self._config = config
        self._hooks = hooks
        self._progress = progress
        self._total_steps = total_steps
        self._total_epochs = total_epochs
        self._overwrite = overwrite
        self._launched: deque[_Launched] = deque()

    def due(self, step: int) -> tuple[Kind, ...]:
        """What is saved at `step`: exports and checkpoints also at the last, a snapshot never beside a checkpoint."""
        checkpoint, is_last = self._config.checkpoint, step == self._total_steps
        kinds: list[Kind] = []
        if checkpoint.checkpoint_interval is not None and (is_last or _divides(checkpoint.checkpoint_interval, step)):
            kinds.append("checkpoint")
        elif _divides(checkpoint.snapshot_interval, step):
            kinds.append("snapshot")
        if is_last or _divides(self._config.export.hf_interval, step):
            kinds.append("hf")
        return tuple(kinds)

    @property
    def at_preemption(self) -> Kind | None:
        """What is saved when the job is preempted; None if it saves nothing to go on from."""
        checkpoint = self._config.checkpoint
        if checkpoint.snapshot_interval is not None:
            return "snapshot"
        return "checkpoint" if checkpoint.checkpoint_interval is not None else None

    def launch(self, kinds: Sequence[Kind], step: int, epoch: int, train_state: Mapping[str, Any]) -> None:
        """Save the state as it is now, once for each of `kinds`.

        Blocks for the copy, and for the save before it if that is still in flight, which is then delivered first; for a
        kind that is not asynchronous until it is delivered. An export is copied together with the checkpoint or
        snapshot beside it. Raises `SaveFailed` of any of them.
        """
        futures = self._start(kinds, step, train_state)
        self.deliver_all(step)
        self._launched.extend(_Launched(kind=k, step=step, epoch=epoch, future=f) for k, f in futures.items())
        is_async = {
            "hf": self._config.export.async_hf_export,
            "checkpoint": self._config.checkpoint.async_checkpoint,
            "snapshot": self._config.checkpoint.async_checkpoint,
        }
        if not all(is_async[kind] for kind in kinds):
            self.deliver_all(step)

    def save_to_go_on(self, step: int, epoch: int, train_state: Mapping[str, Any]) -> str | None:
        """Save what it takes to go on from `step`, and wait until that is published and delivered; its name.

        An export that is due too is left to the run that goes on. None: it failed, and that is to be borne.
        """
        kind = "checkpoint" if "checkpoint" in self.due(step) else self.at_preemption
        assert kind is not None, "a run that saves nothing to go on from is not preempted"
        self.launch((kind,), step, epoch, train_state)
        self.deliver_all(step)
        is_saved = any((report.kind, report.step) == (kind, step) for report in self._checkpointer.reports)
        return f"{kind}-{step}" if is_saved else None

    def _start(self, kinds: Sequence[Kind], step: int, train_state: Mapping[str, Any]) -> dict[Kind, Future[Path]]:
        """Ask for the saves; by kind, in the order in which they are published."""
        if tuple(kinds) == ("hf",):
            return {"hf": self._checkpointer.async_save_hf(step, overwrite=self._overwrite)}
        kind, is_snapshot = kinds[0], "snapshot" in kinds
        if "hf" in kinds:
            checkpoint, export = self._checkpointer.async_save_both(
                step, train_state=train_state, snapshot=is_snapshot, overwrite=self._overwrite
            )
            return {kind: checkpoint, "hf": export}
        future = self._checkpointer.async_save(
            step, train_state=train_state, snapshot=is_snapshot, overwrite=self._overwrite
        )
        return {kind: future}

    def prepare(self) -> None:
        """Have the first checkpoint or snapshot not wait for its layout and its memory; after the first step."""
        checkpoint, steps = self._config.checkpoint, range(1, self._total_steps + 1)
        if checkpoint.checkpoint_interval is not None or checkpoint.snapshot_interval is not None:
            self._checkpointer.prepare(both=any(len(self.due(step)) > 1 for step in steps))

    def is_settled(self) -> bool:
        """Whether this rank knows how the next launched save ended; other ranks may know a little earlier or later."""
        return bool(self._launched) and self._launched[0].future.done()

    def deliver_all(self, step: int) -> None:
        """Deliver what is launched, each as `deliver` does."""
        while self._launched:
            self.deliver(step)

    def deliver(self, step: int) -> None:
        """Report the next launched save, and run its hooks; blocks until it is published.

        `step` is the one that training has reached. Raises the `SaveFailed` of the save, unless it is to be borne, and
        what hooks raise.
        """
        launched = self._launched.popleft()
        try:
            path = launched.future.result()
        except SaveFailed as error:
            self._checkpointer.check()  # raises it, or not, by what on_failure says
            self._progress.say(f"training goes on without {launched.kind}-{launched.step}: {error}")
            return
        kinds = (launched.kind, TOGETHER)
        reports = reversed(self._checkpointer.reports)
        report = next(report for report in reports if report.step == launched.step and report.kind in kinds)
        self._progress.save(
            launched.kind,
            SaveMetrics(
                step=launched.step,
                seen_at_step=step,
                path=str(path),
                staged_bytes=report.staged_bytes,
                wait_s=report.wait_s,
                stall_s=report.stall_s,
                written_s=report.written_s,
                published_s=report.published_s,
            ),
        )
        for hook in self._hooks:
            call = {"hf": hook.after_hf_export, "checkpoint": hook.after_checkpoint, "snapshot": hook.after_snapshot}
            call[launched.kind](path, launched.step, launched.epoch, self._total_steps, self._total_epochs)

    def in_flight(self) -> str | None:
        """The save in flight in a few words, such as "hf-40: written 61%"."""
        progress = self._checkpointer.in_flight
        return None if progress is None else str(progress)


def _divides(interval: int | None, step: int) -> bool:
    return interval is not None and interval > 0 and step % interval == 0
