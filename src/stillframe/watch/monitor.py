"""Failures of background saves, kept until the training thread can raise them."""

from __future__ import annotations

import threading
from collections import deque

from stillframe.errors import StillframeError


class Monitor:
    """Hands failures from background threads to the training thread; each is raised there once, in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures: deque[StillframeError] = deque()

    def report(self, failure: StillframeError) -> None:
        with self._lock:
            self._failures.append(failure)

    def withdraw(self, failure: BaseException) -> None:
        """Forget a failure that the caller raises itself (a save that waits for its own result)."""
        with self._lock:
            self._failures = deque(kept for kept in self._failures if kept is not failure)

    def raise_pending(self) -> None:
        """Raise the oldest failure that was not raised yet; return at once if there is none."""
        with self._lock:
            failure = self._failures.popleft() if self._failures else None
        if failure is not None:
            raise failure
