"""Rank 0's part of an attempt: make the hidden directory, prove from the receipts that it is whole, publish it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from stillframe import durable, names
from stillframe.commit.hidden import HiddenDirectory
from stillframe.commit.plan import AttemptPlan, encode_plan, entries
from stillframe.commit.proof import Doubt, Proven, prove
from stillframe.errors import CheckpointExists, InsufficientSpace, SaveFailed
from stillframe.manifest import Manifest
from stillframe.receipts import decode_receipt
from stillframe.records import InlineFile, Receipt


class Publication:
    """One attempt to publish what `plan` says, driven by rank 0.

    First `prepare`; then, once all ranks have voted, `prove` and `publish` or not; `clean_up` in either case. An
    attempt whose job has ended goes on after the votes: with its `hidden` directory, already open, and the
    `plan_content` that was found there.
    """

    def __init__(
        self,
        run_dir: Path,
        plan: AttemptPlan,
        *,
        hidden: HiddenDirectory | None = None,
        plan_content: bytes = b"",
    ) -> None:
        self._run_dir = run_dir
        self._plan = plan
        self._plan_content = plan_content
        self._hidden = hidden or HiddenDirectory(run_dir, kind=plan.kind, step=plan.step)

    @property
    def final_dir(self) -> Path:
        return self._hidden.final_dir

    @property
    def hidden_dir(self) -> Path:
        """Where the directory is, until it is published."""
        return self._hidden.path

    def prepare(self, inline_files: Sequence[InlineFile]) -> tuple[InlineFile, ...]:
        """Make the hidden directory, empty but for the attempt's marker; durable on return.

        Returns what rank 0's writer must write for it to be published: `inline_files` under the names that they have
        until then, and the plan. Before anything is made: refuses a step that is published (unless overwriting, and
        then only what is recognised as a checkpoint of that step), and a file system without room. What an earlier
        attempt at this step left behind is removed.
        """
        self._plan = replace(self._plan, inline_files=entries(inline_files))
        self._plan_content = encode_plan(self._plan)
        to_write = (
            *(replace(file, name=self._plan.written_name(file.name)) for file in inline_files),
            InlineFile(name=names.plan_name(), content=self._plan_content),
        )
        self._hidden.refuse_existing(overwrite=self._plan.overwrite)
        if self._plan.overwrite:
            self._refuse_lack_of_exchange()
        self._hidden.retire()
        self._refuse_lack_of_space(sum(len(file.content) for file in to_write))
        self._hidden.make(self._plan.attempt, self._plan.layout.digest)
        return to_write

    def _refuse_lack_of_exchange(self) -> None:
        if os.path.lexists(self.final_dir) and not durable.can_exchange(self._run_dir, self._plan.attempt):
            reason = (
                "this file system cannot exchange two directories in one step (renameat2 RENAME_EXCHANGE), so a "
                "published checkpoint cannot be replaced without a moment in which there is none; delete it first"
            )
            raise self._hidden.failed(CheckpointExists, reason, "prepare")

    def _refuse_lack_of_space(self, inline_bytes: int) -> None:
        needed = self._plan.layout.total_bytes + inline_bytes
        stat = os.statvfs(self._run_dir)
        free = stat.f_bavail * stat.f_frsize
        if free < needed:
            reason = f"{needed} bytes are needed and {free} are free on the file system of {self._run_dir}"
            raise self._hidden.failed(InsufficientSpace, reason, "prepare")

    def receipts(self) -> tuple[Receipt, ...]:
        """What the ranks' writers left in the directory, by rank. Raises SaveFailed naming one that cannot be used."""
        return tuple(self._receipt(rank) for rank in range(self._plan.layout.world_size))

    def _receipt(self, rank: int) -> Receipt:
        try:
            return decode_receipt((self._hidden.inside / names.receipt_name(rank)).read_bytes())
        except (FileNotFoundError, ValueError) as error:
            reason = f"its receipt cannot be used: {error}"
            raise self._hidden.failed(SaveFailed, reason, "publish", rank=rank) from error

    def prove(self, receipts: Sequence[Receipt]) -> Proven:
        """Raises SaveFailed if the receipts, or the files on disk, leave any doubt that all of it is there."""
        try:
            return prove(self._plan, self._plan_content, receipts, self._hidden.inside)
        except Doubt as doubt:
            raise self._hidden.failed(SaveFailed, str(doubt), "vote") from doubt

    def publish(self, proven: Proven, *, sequence: int) -> None:
        """Put in place what was held back, write the manifest, rename. Published and durable on return.

        Raises SaveFailed or OSError, with nothing published.
        """
        plan = self._plan
        self._hidden.put_in_place(plan.held_back)
        self._hidden.seal(
            Manifest(
                kind=plan.kind,
                step=plan.step,
                attempt=plan.attempt,
                sequence=sequence,
                world_size=plan.layout.world_size,
                layout_digest=plan.layout.digest,
                published_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                git_commit=plan.git_commit,
                versions=dict(plan.versions),
                balance=proven.balance,
                files=proven.files,
                tensors=proven.tensors,
                branch=plan.branch,
                metrics=dict(plan.metrics),
                gathered=plan.layout.gathered,
                reshuffled=plan.layout.reshuffled,
            )
        )
        self._hidden.publish(plan.attempt, overwrite=plan.overwrite)

    def clean_up(self) -> None:
        """Remove what this attempt leaves: after `publish` the version that was replaced, else what was written."""
        self._hidden.clean_up(self._plan.attempt)
