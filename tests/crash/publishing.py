"""A program that publishes hand-made attempts, to be killed or to have its system calls fail: see test_commit_faults.

    publishing.py RUN_DIR                      publish step 5 for the first time
    publishing.py RUN_DIR --overwrite          replace it, of which the caller has made a first version
    publishing.py RUN_DIR --recover            recover what is there, as the start of a job does

It prints "published" when that is done, and "failed: <reason>" if anything fails before or after.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from stillframe.catalog.directory import next_sequence, point_to_newest
from stillframe.catalog.retention import remove_leftovers, retain
from stillframe.commit.recover import recover
from stillframe.errors import SaveFailed
from stillframe.policies import KeepAll, KeepLast, Retention
from stillframe.records import InlineFile
from tests.unit.commit.attempts import Attempt, publish

WHOLE = Attempt(
    {"model.safetensors": [16, 40, 24]},
    world_size=2,
    inline_files=(InlineFile(name="config.json", content=b"{}"), InlineFile(name="sub/last.json", content=b"[]")),
    held_back=("config.json", "sub/last.json"),
    rank_files=(InlineFile(name="sub/state-0", content=b"0"), InlineFile(name="sub/state-1", content=b"1")),
)
FIRST = replace(WHOLE, attempt="0123456789abcdef.1", salt="first")
SECOND = replace(WHOLE, attempt="0123456789abcdef.2", salt="second")
THIRD = replace(WHOLE, attempt="0123456789abcdef.3", salt="third")
OLDER = replace(WHOLE, step=4, attempt="0123456789abcdef.0", salt="older")


def publish_once(run_dir: Path, attempt: Attempt, *, sequence: int, overwrite: bool = False) -> None:
    """As rank 0 does it: publish, then the link, then what is superseded."""
    attempt = replace(attempt, overwrite=overwrite)
    publication = attempt.publication(run_dir)
    try:
        publication.prepare(attempt.rank_0_files)
        attempt.write(publication.hidden_dir)
        attempt.leave_receipts(publication.hidden_dir)
        publish(publication, publication.receipts(), sequence=sequence)
    except (SaveFailed, OSError):
        publication.clean_up()
        raise
    print("published", flush=True)
    point_to_newest(run_dir, "hf", attempt.attempt)
    publication.clean_up()
    keep = Retention(checkpoints=KeepAll(), exports=KeepLast(1))
    retain(run_dir, keep, branch="main", now=datetime.now(UTC), attempt=attempt.attempt)


def start(run_dir: Path) -> list[str]:
    """As rank 0 does it when a job starts; what became of each directory that there was."""
    results = recover(run_dir, next_sequence=next_sequence(run_dir))
    point_to_newest(run_dir, "hf", "0123456789abcdef.0")
    remove_leftovers(run_dir)
    return [result.action for result in results]


def main() -> None:
    run_dir = Path(sys.argv[1])
    overwrite = "--overwrite" in sys.argv
    try:
        if "--recover" in sys.argv:
            logging.disable()  # it is told what was done, which is not what these tests look at
            start(run_dir)
            print("published", flush=True)
            return
        publish_once(run_dir, SECOND if overwrite else FIRST, sequence=3, overwrite=overwrite)
    except (SaveFailed, OSError) as error:
        print(f"failed: {error}", flush=True)


if __name__ == "__main__":
    main()
