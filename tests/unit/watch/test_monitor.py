"""Failures on their way from background threads to the training thread."""

from __future__ import annotations

import threading
from pathlib import Path

from stillframe.errors import SaveFailed, StillframeError
from stillframe.watch.monitor import Monitor


def failure(step: int) -> SaveFailed:
    return SaveFailed("disk full", step=step, rank=1, stage="write", path=Path(f"/run/hf-{step}"))


def raised(monitor: Monitor) -> StillframeError | None:
    try:
        monitor.raise_pending()
    except StillframeError as error:
        return error
    return None


def test_each_failure_is_raised_once_and_in_order() -> None:
    monitor = Monitor()
    assert raised(monitor) is None
    failures = [failure(step) for step in (1, 2)]
    for one in failures:
        monitor.report(one)
    assert [raised(monitor) for _ in range(3)] == [*failures, None]


def test_a_failure_that_the_caller_raises_itself_is_not_raised_again() -> None:
    monitor = Monitor()
    first, second = failure(1), failure(1)  # equal in all but identity
    monitor.report(first)
    monitor.report(second)
    monitor.withdraw(first)
    monitor.withdraw(ValueError("never reported"))
    assert raised(monitor) is second
    assert raised(monitor) is None


def test_no_failure_is_lost_or_doubled_between_threads() -> None:
    monitor = Monitor()
    failures = [failure(step) for step in range(400)]
    start = threading.Barrier(5)

    def report(part: list[SaveFailed]) -> None:
        start.wait(30)
        for one in part:
            monitor.report(one)

    threads = [threading.Thread(target=report, args=(failures[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    start.wait(30)
    seen = []
    while any(thread.is_alive() for thread in threads):
        seen.append(raised(monitor))
    seen += iter(lambda: raised(monitor), None)
    assert sorted(id(error) for error in seen if error is not None) == sorted(map(id, failures))
