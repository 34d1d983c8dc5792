"""How far a save is: the states in their order, and times that add up."""

from __future__ import annotations

from pathlib import Path

from stillframe.watch.progress import SaveProgress, Tracker

PATH = Path("/run/hf-5")


def test_a_save_is_staged_then_written_then_published() -> None:
    tracker = Tracker("hf", 5)
    tracker.waited()
    tracker.staged(100)
    assert tracker.progress() == SaveProgress(kind="hf", step=5, state="staged", bytes_done=0, bytes_total=0)
    tracker.wrote(0, 100)
    tracker.wrote(60, 100)
    assert tracker.progress() == SaveProgress(kind="hf", step=5, state="staged", bytes_done=60, bytes_total=100)
    tracker.wrote(100, 100)
    tracker.written()
    assert tracker.progress() == SaveProgress(kind="hf", step=5, state="written", bytes_done=100, bytes_total=100)
    tracker.published()
    assert tracker.progress() == SaveProgress(kind="hf", step=5, state="published", bytes_done=100, bytes_total=100)


def test_the_report_counts_every_time_from_the_call() -> None:
    tracker = Tracker("hf", 5)
    tracker.waited()
    tracker.staged(100)
    tracker.written()
    tracker.published()
    report = tracker.report(PATH)
    assert (report.kind, report.step, report.path, report.staged_bytes) == ("hf", 5, PATH, 100)
    assert 0 <= report.wait_s <= report.stall_s <= report.written_s <= report.published_s
