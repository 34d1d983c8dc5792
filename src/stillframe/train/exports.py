"""The Hugging Face exports of a run: when they are due, and what follows once each is published."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from stillframe.checkpointer import Checkpointer
from stillframe.train.config import ExportConfig
from stillframe.train.hooks import Hook
from stillframe.train.progress import ExportMetrics, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    step: int
    epoch: int
    future: Future[Path]


class Exports:
    """Launches exports, and delivers each to the progress and the hooks after its publication.

    All ranks call the same methods at the same steps, so that hooks run at the same step everywhere.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: ExportConfig,
        hooks: Sequence[Hook],
        progress: Progress,
        *,
        total_steps: int,
        total_epochs: int,
    ) -> None:
        self._checkpointer = checkpointer
        self._config = config
        self._hooks = hooks
        self._progress = progress
        self._total_steps = total_steps
        self._total_epochs = total_epochs
        self._launched: _Launched | None = None

    def is_due(self, step: int) -> bool:
        interval = self._config.hf_interval
        return step == self._total_steps or (interval is not None and step % interval == 0)

    def launch(self, step: int, epoch: int) -> None:
        """Export the weights as they are now.

        Blocks for the snapshot, and for the export before it if that is still in flight, which is then delivered first;
        with `async_hf_export = false` until this one is delivered. Raises `SaveFailed` of either.
        """
        future = self._checkpointer.async_save_hf(step)
        self.deliver(step)
        self._launched = _Launched(step=step, epoch=epoch, future=future)
        if not self._config.async_hf_export:
            self.deliver(step)

    def is_settled(self) -> bool:
        """Whether this rank knows how the launched export ended; other ranks may know it a little earlier or later."""
        return self._launched is not None and self._launched.future.done()

    def deliver(self, step: int) -> None:
        """Report the launched export, if there is one, and run its hooks; blocks until it is published.

        `step` is the one that training has reached. Raises the `SaveFailed` of the export, and what hooks raise.
        """
        if self._launched is None:
            return
        launched, self._launched = self._launched, None
        path = launched.future.result()
        report = next(report for report in self._checkpointer.reports if report.step == launched.step)
        self._progress.export(
            ExportMetrics(
                step=launched.step,
                seen_at_step=step,
                path=str(path),
                staged_bytes=report.staged_bytes,
                wait_s=report.wait_s,
                stall_s=report.stall_s,
                written_s=report.written_s,
                published_s=report.published_s,
            )
        )
        for hook in self._hooks:
            hook.after_hf_export(path, launched.step, launched.epoch, self._total_steps, self._total_epochs)

    def in_flight(self) -> str | None:
        """The save in flight in a few words, such as "hf-40: written 61%"."""
        progress = self._checkpointer.in_flight
        if progress is None:
            return None
        if progress.bytes_done < progress.bytes_total:
            return f"hf-{progress.step}: written {progress.bytes_done / progress.bytes_total:.0%}"
        return f"hf-{progress.step}: {progress.state}"
