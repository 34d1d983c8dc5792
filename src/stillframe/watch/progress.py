"""How far a save is, and how long its parts took."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["staged", "written", "published"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveProgress:
    """A save in flight, as this rank sees it.

    `state`: "staged" (in the arena, being written), "written" (this rank's share is on disk and fsynced; others may
    still write), "published" (the checkpoint has its final name). Bytes are this rank's. `kind`: "hf", "checkpoint",
    "snapshot" or "step", as in the directory's name.
    """

    kind: str
    step: int
    state: State
    bytes_done: int
    bytes_total: int

    def __str__(self) -> str:
        """In a few words, such as "hf-40: written 61%"."""
        written = f"written {self.bytes_done / self.bytes_total:.0%}" if self.bytes_done < self.bytes_total else None
        return f"{self.kind}-{self.step}: {written or self.state}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """A published save, as this rank saw it. Times are seconds since the call.

    `stall_s` is how long the call held the training thread, of which `wait_s` was for the save before it.
    `staged_bytes` were copied by this rank; of a checkpoint and an export that were copied together, both reports have
    all of them. `written_s`: this rank's share was fsynced; `published_s`: the checkpoint
    has its final name and this rank knows.
    """

    kind: str
    step: int
    path: Path
    staged_bytes: int
    wait_s: float
    stall_s: float
    written_s: float
    published_s: float


class Tracker:
    """Follows one save; written to by the training thread, then by the save's own thread, read by anyone."""

    def __init__(self, kind: str, step: int) -> None:
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self._kind = kind
        self._step = step
        self._staged_bytes = 0
        self._state: State = "staged"
        self._bytes = (0, 0)
        self._wait_s = self._stall_s = self._written_s = self._published_s = 0.0

    def waited(self) -> None:
        self._wait_s = time.monotonic() - self._begin

    def staged(self, staged_bytes: int) -> None:
        self._staged_bytes = staged_bytes
        self._stall_s = time.monotonic() - self._begin

    def wrote(self, bytes_done: int, bytes_total: int) -> None:
        with self._lock:
            self._bytes = (bytes_done, bytes_total)

    def written(self) -> None:
        with self._lock:
            self._state = "written"
            self._written_s = time.monotonic() - self._begin

    def published(self) -> None:
        with self._lock:
            self._state = "published"
            self._published_s = time.monotonic() - self._begin

    def progress(self) -> SaveProgress:
        with self._lock:
            done, total = self._bytes
            return SaveProgress(kind=self._kind, step=self._step, state=self._state, bytes_done=done, bytes_total=total)

    def report(self, path: Path) -> SaveReport:
        with self._lock:
            return SaveReport(
                kind=self._kind,
                step=self._step,
                path=path,
                staged_bytes=self._staged_bytes,
                wait_s=self._wait_s,
                stall_s=self._stall_s,
                written_s=self._written_s,
                published_s=self._published_s,
            )
