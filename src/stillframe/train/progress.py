"""What a run says while it goes: a line per logged step and per export on stdout, the same in `metrics.jsonl`.

Rank 0 speaks; on the other ranks all of this does nothing. `metrics.jsonl` has one JSON object per line, each with
`event` ("step" or "hf_export") and `step`; the records below are its fields.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TextIO

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One logged step. `loss` is the mean over all label tokens of all ranks since the step logged before.

    `step_s` is the mean time of a training step since then; `tokens_per_s` counts all ranks' tokens against the whole
    time, exports and hooks included. `saving` is the save in flight, such as "hf-40: written 61%", else None.
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
class ExportMetrics:
    """One published export, as rank 0 saw it; seconds since it was asked for.

    Training stood still for `stall_s`, of which `wait_s` was for an earlier save still in flight. `step` is the step it
    holds the weights of, `seen_at_step` the step that training had reached when it was known to be published.
    """

    step: int
    seen_at_step: int
    path: str
    staged_bytes: int
    wait_s: float
    stall_s: float
    written_s: float
    published_s: float


class Progress:
    """Writes the lines of one run, on rank 0. Each line of `metrics.jsonl` is handed to the kernel at once."""

    def __init__(self, run_dir: Path, *, rank: int, total_steps: int) -> None:
        self._total_steps = total_steps
        self._metrics: TextIO | None = None
        if rank == 0:
            self._metrics = (run_dir / METRICS_NAME).open("a", encoding="utf-8", buffering=1)

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

    def export(self, metrics: ExportMetrics) -> None:
        self._record("hf_export", metrics)
        self.say(
            f"hf-{metrics.step} published: stall {metrics.stall_s:.3f} s, written after {metrics.written_s:.3f} s, "
            f"published after {metrics.published_s:.3f} s: {metrics.path}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _record(self, event: str, metrics: StepMetrics | ExportMetrics) -> None:
        if self._metrics is not None:
            # JSON has no NaN or infinity; a reader gets null for a loss that is neither.
            fields = {name: _finite(value) for name, value in asdict(metrics).items()}
            self._metrics.write(json.dumps({"event": event, **fields}) + "\n")


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
