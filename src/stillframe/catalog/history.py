"""The run's history, `run.json`: who launched it when, from what code, how far each launch came, and what is published.

It is derived: written after the fact, replaced whole, and never read to decide anything. Without it a run resumes just
the same, and loses nothing but this history. Format version 1, described in docs/format.md.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stillframe.catalog.directory import list_checkpoints
from stillframe.durable import fsync_dir, write_file
from stillframe.fields import array, integer, required, table, text
from stillframe.names import HISTORY_NAME
from stillframe.records import CatalogEntry

FORMAT = "stillframe-history/1"

_log = logging.getLogger("stillframe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One start of the training, from its Checkpointers' construction to their end.

    Times are UTC, ISO 8601. `ended_at` is None while it runs, and for ever where it did not end by itself (killed).
    `resumed_from` is the name of the checkpoint that it went on from, None if it began anew. `begin_step` is the step
    after which it began, `end_step` the last that it is known to have reached. `host` is rank 0's. `git_diff` is None
    outside of git, "" where nothing differed from `git_commit`.
    """

    started_at: str
    ended_at: str | None
    host: str
    argv: tuple[str, ...]
    world_size: int
    versions: Mapping[str, str]
    git_commit: str | None
    git_diff: str | None
    branch: str
    resumed_from: str | None
    begin_step: int
    end_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A checkpoint that was there when the history was written."""

    name: str
    kind: str
    step: int
    branch: str
    sequence: int
    published_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHistory:
    """All launches of a run, oldest first, and what is published, oldest publication first."""

    launches: tuple[Launch, ...] = ()
    published: tuple[Published, ...] = ()


class History:
    """Rank 0's pen for `run.json`. Each call but the constructor writes it anew, whole and durable on return.

    Call `published` when a checkpoint is published, never before. The calls of one object must not overlap. Every one
    raises OSError if it cannot write, and NotACheckpoint if the run directory is gone; the training can go on without.
    """

    def __init__(self, run_dir: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = run_dir / HISTORY_NAME
        self._now = now
        self._earlier: tuple[Launch, ...] = ()
        self._launch: Launch | None = None

    def begin(
        self,
        *,
        world_size: int,
        versions: Mapping[str, str],
        git_commit: str | None,
        git_diff: str | None,
        argv: Sequence[str] | None = None,
    ) -> None:
        """A launch begins, at step 0 of the first branch unless `resumed` says otherwise. `argv` None: sys.argv."""
        self._earlier = read_history(self._path).launches
        self._launch = Launch(
            started_at=self._time(),
            ended_at=None,
            host=platform.node(),
            argv=tuple(sys.argv if argv is None else argv),
            world_size=world_size,
            versions=dict(versions),
            git_commit=git_commit,
            git_diff=git_diff,
            branch="",
            resumed_from=None,
            begin_step=0,
            end_step=0,
        )
        self._write()

    def resumed(self, name: str, *, step: int, branch: str) -> None:
        """This launch goes on after `step`, from the published checkpoint `name`, on `branch`."""
        self._launch = replace(self._begun(), resumed_from=name, begin_step=step, end_step=step, branch=branch)
        self._write()

    def published(self, step: int) -> None:
        """A checkpoint of `step` has been published, and retention is done: list what there is now."""
        launch = self._begun()
        self._launch = replace(launch, end_step=max(launch.end_step, step))
        self._write()

    def end(self, step: int | None = None) -> None:
        """The launch has ended by itself, after `step` if that is known."""
        launch = self._begun()
        end_step = launch.end_step if step is None else max(launch.end_step, step)
        self._launch = replace(launch, ended_at=self._time(), end_step=end_step)
        self._write()

    def _begun(self) -> Launch:
        assert self._launch is not None, "begin comes first"
        return self._launch

    def _time(self) -> str:
        return self._now().isoformat(timespec="milliseconds")

    def _write(self) -> None:
        history = RunHistory(
            launches=(*self._earlier, self._begun()),
            published=tuple(_published(entry) for entry in list_checkpoints(self._path.parent)),
        )
        write_file(self._path, encode_history(history))
        fsync_dir(self._path.parent)


def read_history(path: Path) -> RunHistory:
    """The history in the file `path`; an empty one if there is no such file.

    A file that is no history of this version is moved aside, to `<name>.damaged` (in place of one that was moved there
    before), with a warning, and the history is empty then. Raises OSError if it cannot be read or moved, and
    FileExistsError if something that is no file has its name.
    """
    if not os.path.lexists(path):
        return RunHistory()
    if not path.is_file():  # reading a FIFO would wait for ever
        raise FileExistsError(f"{path} is in the way of the run's history: it exists and is not a regular file")
    try:
        return decode_history(path.read_bytes())
    except ValueError as error:
        damaged = path.with_name(f"{path.name}.damaged")
        path.replace(damaged)
        fsync_dir(path.parent)
        _log.warning(
            "%s is no run history that can be read (%s); it is now %s, and a new one begins", path, error, damaged
        )
        return RunHistory()


def encode_history(history: RunHistory) -> bytes:
    """Equal diffs are stored once: a run that is restarted a hundred times has the same one a hundred times."""
    diffs: dict[str, str] = {}
    launches = []
    for launch in history.launches:
        fields = asdict(launch)
        if launch.git_diff is not None:
            fields["git_diff"] = _digest(launch.git_diff)
            diffs[fields["git_diff"]] = launch.git_diff
        launches.append(fields)
    published = [asdict(entry) for entry in history.published]
    fields = {"format": FORMAT, "launches": launches, "published": published, "git_diffs": diffs}
    # In ASCII: arguments may hold bytes that are no UTF-8, which Python represents by lone surrogates.
    return (json.dumps(fields, indent=1) + "\n").encode("ascii")


def decode_history(content: bytes) -> RunHistory:
    """Raises ValueError, saying why, for anything that is not a whole history of a known version."""
    try:
        data = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if text(data, "format") != FORMAT:
        raise ValueError(f"its format is {data['format']!r:.60}, not {FORMAT}")
    diffs = _texts(data, "git_diffs")
    return RunHistory(
        launches=tuple(_launch(launch, diffs) for launch in array(data, "launches")),
        published=tuple(
            Published(
                name=text(entry, "name"),
                kind=text(entry, "kind"),
                step=integer(entry, "step"),
                branch=text(entry, "branch"),
                sequence=integer(entry, "sequence"),
                published_at=text(entry, "published_at"),
            )
            for entry in array(data, "published")
        ),
    )


def _launch(data: Any, diffs: Mapping[str, str]) -> Launch:
    diff = _optional_text(data, "git_diff")
    argv = array(data, "argv")
    if not all(isinstance(argument, str) for argument in argv):
        raise ValueError("'argv' should be a list of texts")
    return Launch(
        started_at=text(data, "started_at"),
        ended_at=_optional_text(data, "ended_at"),
        host=text(data, "host"),
        argv=tuple(argv),
        world_size=integer(data, "world_size"),
        versions=_texts(data, "versions"),
        git_commit=_optional_text(data, "git_commit"),
        git_diff=None if diff is None else text(diffs, diff),
        branch=text(data, "branch"),
        resumed_from=_optional_text(data, "resumed_from"),
        begin_step=integer(data, "begin_step"),
        end_step=integer(data, "end_step"),
    )


def _optional_text(data: Any, key: str) -> str | None:
    return None if required(data, key) is None else text(data, key)


def _texts(data: Any, key: str) -> dict[str, str]:
    values = table(data, key)
    return {name: text(values, name) for name in values}


def _digest(diff: str) -> str:
    return hashlib.sha256(diff.encode(errors="surrogatepass")).hexdigest()[:16]


def _published(entry: CatalogEntry) -> Published:
    return Published(
        name=entry.path.name,
        kind=entry.kind,
        step=entry.step,
        branch=entry.branch,
        sequence=entry.sequence,
        published_at=entry.published_at,
    )
