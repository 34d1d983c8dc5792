"""A program that publishes hand-made attempts, to be killed or to have its system calls fail: see test_commit_faults.

    publishing.py RUN_DIR                      publish step 5 for the first time
    publishing.py RUN_DIR --overwrite          replace it, of which the caller has made a first version

It prints "published" when that is done, and "failed: <reason>" if anything fails before or after.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from stillframe.catalog.retention import retain
from stillframe.durable import replace_link
from stillframe.errors import SaveFailed
from stillframe.policies import KeepAll, KeepLast, Retention
from tests.unit.commit.attempts import Attempt, publish

ITEMS = {"model.safetensors": [16, 40, 24]}
FIRST = Attempt(ITEMS, 2, attempt="0123456789abcdef.1", salt="first")
SECOND = Attempt(ITEMS, 2, attempt="0123456789abcdef.2", salt="second")
THIRD = Attempt(ITEMS, 2, attempt="0123456789abcdef.3", salt="third")
OLDER = Attempt(ITEMS, 2, step=4, attempt="0123456789abcdef.0", salt="older")


def publish_once(run_dir: Path, attempt: Attempt, *, sequence: int, overwrite: bool = False) -> None:
    """As rank 0 does it: publish, then the link, then what is superseded."""
    attempt = replace(attempt, overwrite=overwrite)
    publication = attempt.publication(run_dir)
    try:
        publication.prepare(attempt.inline_files)
        attempt.write(publication.hidden_dir)
        publish(publication, attempt.receipts(attempt.item_pieces()), sequence=sequence)
    except (SaveFailed, OSError):
        publication.clean_up()
        raise
    print("published", flush=True)
    replace_link(run_dir / "hf-latest", publication.final_dir.name, attempt.attempt)
    publication.clean_up()
    keep = Retention(checkpoints=KeepAll(), exports=KeepLast(1))
    retain(run_dir, keep, branch="", now=datetime.now(UTC), attempt=attempt.attempt)


def main() -> None:
    run_dir = Path(sys.argv[1])
    overwrite = "--overwrite" in sys.argv
    try:
        publish_once(run_dir, SECOND if overwrite else FIRST, sequence=3, overwrite=overwrite)
    except (SaveFailed, OSError) as error:
        print(f"failed: {error}", flush=True)


if __name__ == "__main__":
    main()
