"""What a run says while it goes: a line per logged step and per save on stdout, the same in `metrics.jsonl`.

Rank 0 speaks; on the other ranks all of this does nothing. `metrics.jsonl` has one JSON object per line, each with
`event` ("step", "hf_export", "checkpoint", "snapshot" or "resume") and `step`; the records below are its fields. A run
that resumes goes on in the same file, with a "resume" first; steps that it takes again come again, and the last line of
a step is the one that counts.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TextIO

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One logged step. `loss` is the mean over all label tokens of all ranks since the step logged before.

    `step_s` is the mean time of a training step since then; `tokens_per_s` counts all ranks' tokens against the whole
    time, saves and hooks included. `saving` is the save in flight, such as "hf-40: written 61%"; else one that was in
    flight as a step began, "hf-40: over meanwhile"; else None.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    step_s: float
    saving: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveMetrics:
    """One published save, as rank 0 saw it; seconds since it was asked for.

    Training stood still for `stall_s`, of which `wait_s` was for an earlier save still in flight. `step` is the step it
    holds the state of, `seen_at_step` the step that training had reached when it was known to be published.
    """

    step: int
    seen_at_step: int
    path: str
    staged_bytes: int
    wait_s: float
    stall_s: float
    written_s: float
    published_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeMetrics:
    """Where a run went on from: `step` is the last one that the checkpoint at `path` holds, the totals are up to it.

    `saved_world_size` and `world_size`: ranks that saved it, and that go on. `recovered`: what the start did with saves
    that had been cut off. `begun_anew`: the parts that were not loaded.
    """

    step: int
    epoch: int
    path: str
    consumed_samples: int
    consumed_tokens: int
    train_time_s: float
    saved_world_size: int | None
    world_size: int
    recovered: tuple[str, ...]
    begun_anew: tuple[str, ...]


EVENTS = {"hf": "hf_export", "checkpoint": "checkpoint", "snapshot": "snapshot"}
"""Kinds of saves, and what their lines in `metrics.jsonl` are called."""


class Progress:
    """Writes the lines of one run, on rank 0. Each line of `metrics.jsonl` is handed to the kernel at once."""

    def __init__(self, run_dir: Path, *, rank: int, total_steps: int) -> None:
        self._run_dir = run_dir.absolute()
        self._total_steps = total_steps
        self._metrics: TextIO | None = None
        if rank == 0:
            self._metrics = _open_to_append(run_dir / METRICS_NAME)

    def say(self, line: str) -> None:
        if self._metrics is not None:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def step(self, metrics: StepMetrics) -> None:
        width = len(str(self._total_steps))
        parts = [
            f"step {metrics.step:>{width}}/{self._total_steps}",
            f"loss {metrics.loss:.4f}",
            f"lr {metrics.learning_rate:.2e}",
            f"grad norm {metrics.grad_norm:.3f}",
            f"{metrics.tokens_per_s:,.0f} tokens/s",
            f"{metrics.step_s:.3f} s/step",
        ]
        self._record("step", metrics)
        self.say("  ".join(parts + ([metrics.saving] if metrics.saving else [])))

    def save(self, kind: str, metrics: SaveMetrics) -> None:
        self._record(EVENTS[kind], metrics)
        self.say(
            f"{self._name(metrics.path)} published: stall {metrics.stall_s:.3f} s, written after "
            f"{metrics.written_s:.3f} s, published after {metrics.published_s:.3f} s: {metrics.path}"
        )

    def resume(self, metrics: ResumeMetrics) -> None:
        self._record("resume", metrics)
        self.say(
            f"resumed at step {metrics.step} from {metrics.path}: epoch {metrics.epoch}, "
            f"{metrics.consumed_samples:,} sequences read, {metrics.train_time_s:.0f} s of training"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _name(self, path: str) -> str:
        """As `RUN_DIR` has it: `hf-40`, or `step-40/hf` where an export and a checkpoint are one."""
        return str(Path(path).relative_to(self._run_dir)) if Path(path).is_relative_to(self._run_dir) else path

    def _record(self, event: str, metrics: StepMetrics | SaveMetrics | ResumeMetrics) -> None:
        if self._metrics is not None:
            # JSON has no NaN or infinity; a reader gets null for a loss that is neither.
            fields = {name: _finite(value) for name, value in asdict(metrics).items()}
            self._metrics.write(json.dumps({"event": event, **fields}) + "\n")


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_to_append(path: Path) -> TextIO:
    """What a crash may have left of a last line becomes a line of its own, so that the next one is whole."""
    file = path.open("a+", encoding="utf-8", buffering=1)
    try:
        with path.open("rb") as reader:
            size = reader.seek(0, os.SEEK_END)
            if size and (reader.seek(size - 1), reader.read(1))[1] != b"\n":
                file.write("\n")
    except BaseException:
        file.close()
        raise
    return file
