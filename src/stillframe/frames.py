"""Still frames: this rank's share of what is saved, copied into its arena, ready for its writer process.

There is one arena and one writer process, whatever is saved. Four things can be framed: an export, a checkpoint, both
of one step staged once, and both as one directory. Each has plans of its own over the arena, made when first asked for
and kept while model and optimizer keep their tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from stillframe.errors import StillframeError, UnsupportedModel
from stillframe.export import Export
from stillframe.layout.distcp import DistcpPlan
from stillframe.layout.huggingface import HuggingFacePlan
from stillframe.layout.together import as_one, plan_together, share_as_one
from stillframe.limits import WriterLimits
from stillframe.names import CHECKPOINT_PART, EXPORT_PART
from stillframe.records import Blocks, Copy, Envelope, Gather, InlineFile, Layout, Reshuffle, WritePlan
from stillframe.resumable import Resumable
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.copy import Snapshotter
from stillframe.snapshot.gather import Compute
from stillframe.snapshot.peers import Peers
from stillframe.writer.client import WriterClient

_log = logging.getLogger("stillframe")

What = Literal["hf", "checkpoint", "both", "step"]
"""What a frame is of: an export, a checkpoint, both as two directories, or both as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One directory that a frame becomes.

    `staged_bytes`: what this rank copied for the whole frame. `files` renders what rank 0 (and of a checkpoint each
    rank) writes beside the tensors; it is called in the background, and what it renders was captured with the frame.
    """

    layout: Layout
    plan_id: int
    staged_bytes: int
    files: Callable[[], tuple[InlineFile, ...]]


@dataclass(slots=True, kw_only=True)
class _Staging:
    """The plans of one `What`, by the order of its parts, and how the arena is filled for them."""

    layouts: tuple[Layout, ...]
    plans: tuple[WritePlan, ...]
    copies: Sequence[Copy]
    envelopes: Sequence[Envelope]
    tensors: Mapping[str, torch.Tensor]
    blocks: Blocks | None
    gathers: Sequence[Gather] = ()
    compute: Compute | None = None
    exchanges: bool = False
    reshuffles: Sequence[Reshuffle] = ()
    snapshotter: Snapshotter | None = None

    @property
    def bucket_bytes(self) -> int:
        return max((layout.gathered.bucket_bytes for layout in self.layouts if layout.gathered is not None), default=0)

    @staticmethod
    def of_one(plan: HuggingFacePlan | DistcpPlan) -> _Staging:
        share = plan.share
        return _Staging(
            layouts=(plan.layout,),
            plans=(share.plan,),
            copies=share.copies,
            envelopes=share.envelopes,
            tensors=plan.tensors,
            blocks=plan.blocks if isinstance(plan, HuggingFacePlan) else None,
            gathers=plan.gathers if isinstance(plan, HuggingFacePlan) else (),
            compute=plan.conversion.compute if isinstance(plan, HuggingFacePlan) and plan.conversion else None,
            exchanges=isinstance(plan, HuggingFacePlan) and plan.exchanges,
            reshuffles=share.reshuffles,
        )


class Frames:
    """Takes the frames of one Checkpointer. One thread at a time, and never while the writer uses the arena."""

    def __init__(
        self,
        export: Export | None,
        resumable: Resumable,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        limits: WriterLimits,
    ) -> None:
        """Plan the export, if there is one, allocate the arena, start the writer.

        `timeout_s` bounds the wait for the other ranks in a frame that they must take together.

        Raises LayoutError, StillframeError, or the writer's WriterError; nothing is left then.
        """
        self.export = export
        self.resumable = resumable
        self._rank = rank
        self._world_size = world_size
        self._limits = limits
        self._plans = 0
        self._stagings: dict[What, _Staging] = {}
        self._met: set[What] = set()
        self._current: _Staging | None = None
        self._arena: Arena | None = None
        self._writer: WriterClient | None = None
        self._peers = Peers(timeout_s)
        self._is_met = False
        try:
            what: What = "hf" if export is not None else "checkpoint"
            self._meet(what)
            self.prepare(what)
        except BaseException:
            self.close()
            raise

    @property
    def writer(self) -> WriterClient:
        assert self._writer is not None, "Frames that were made have a writer until they are closed"
        return self._writer

    @property
    def layout(self) -> Layout:
        """Of what the constructor planned; its digest is the same on all ranks."""
        (staging,) = self._stagings.values()
        (layout,) = staging.layouts
        return layout

    def without_content(self, what: What) -> tuple[Part, ...]:
        """Parts of a frame that could not be taken: nothing can be written from them, and no other rank agrees.

        Those that wait for this rank, if the frame is one that all must take together, are told.
        """
        if what != "checkpoint" and self._is_met and not self._peers.was_met:
            try:
                self._peers.absent()
            except StillframeError as error:
                _log.error("%s", error)
        self._peers.was_met = False
        formats = {"both": ("checkpoint", "hf")}.get(what, (what,))
        return tuple(
            Part(
                layout=Layout(
                    format=name, world_size=self._world_size, files=(), inline_files=(), total_bytes=0, digest="none"
                ),
                plan_id=0,
                staged_bytes=0,
                files=tuple,
            )
            for name in formats
        )

    def meet(self, what: What, *, again: bool = True) -> None:
        """Where each rank has a stage of a pipeline, tell each other what is there for `what`; every rank calls this,
        before it plans. Not `again`: only before the first frame of `what`.

        Blocks until every rank has called it, bounded by the timeout of saves. Raises on all ranks what one raised.
        """
        if again or what not in self._met:  # on all ranks alike, as they take the same frames
            self._meet(what)
            self._met.add(what)

    def _meet(self, what: What) -> None:
        for source in self._sources(what):
            source.settle()
            source.meet()

    def prepare(self, what: What) -> None:
        """Make the plans of `what`, if they are not there or the model has changed, with arena and writer for them.

        Nothing is done in the steady state, in which only copies follow. Raises as the constructor does.
        """
        sources = self._sources(what)
        for source in sources:
            source.settle()
        writer_lost = self._writer is None or not self._writer.alive
        staging = self._stagings.get(what)
        is_placed = staging is not None and staging.snapshotter is not None
        if is_placed and not writer_lost and all(source.unchanged() for source in sources):
            return
        with torch.inference_mode(False):  # the plans outlive the block that the save may be called in
            self._drop_stale()
            if what not in self._stagings:
                self._stagings[what] = self._plan(what)
            self._provide()

    def take(self, what: What, *, train_state: bytes) -> tuple[Part, ...]:
        """Copy this rank's share into the arena; when it returns, the tensors may change again.

        Blocks for the copy; of an export that ranks must exchange something for, until all take theirs. Of
        "both", the checkpoint comes first.
        """
        self.prepare(what)
        staging = self._stagings[what]
        assert staging.snapshotter is not None, "what is prepared can be copied"
        if self._current is not staging:
            staging.snapshotter.lay_envelopes()
            self._current = staging
        staging.snapshotter.copy()
        self._peers.was_met = False
        files = self._files(what, train_state)
        return tuple(
            Part(
                layout=layout,
                plan_id=plan.plan_id,
                staged_bytes=staging.snapshotter.staged_bytes,
                files=render,
            )
            for layout, plan, render in zip(staging.layouts, staging.plans, files, strict=True)
        )

    def close(self) -> None:
        """End the writer process and free the arena; waits for neither longer than the writer's own bounds."""
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self._peers.close()
            self._stagings.clear()
            self._free_arena()

    def refuse_unplanned(self, what: What) -> None:
        """Raise UnsupportedModel for what these frames were not made for."""
        if what != "checkpoint" and self.export is None:
            raise UnsupportedModel("this Checkpointer was made with hf_export=False, so it has no exports")

    def _sources(self, what: What) -> list[Export | Resumable]:
        sources: list[Export | Resumable] = [] if what == "hf" else [self.resumable]
        if what != "checkpoint" and self.export is not None:
            sources.append(self.export)
        return sources

    def _drop_stale(self) -> None:
        """Forget the plans that hold tensors which are no longer those of the model, or of its optimizers."""
        for what in list(self._stagings):
            if not all(source.unchanged() for source in self._sources(what)):
                del self._stagings[what]

    def _plan(self, what: What) -> _Staging:
        export = None
        if what != "checkpoint" and self.export is not None:
            # A checkpoint has this rank's own boxes in the arena, and an export of the same step is written from there.
            export = self.export.plan(self._next_id(), may_reshuffle=what == "hf")
        checkpoint = self.resumable.plan(self._next_id()) if what != "hf" else None
        if export is not None:
            shares_blocks = export.blocks is not None and export.blocks.shared_count > 0
            self._is_met = shares_blocks or export.exchanges
        if export is None or checkpoint is None:
            alone = export or checkpoint
            assert alone is not None, "everything is one or both"
            return _Staging.of_one(alone)
        joint = plan_together(export, checkpoint)
        layouts: tuple[Layout, ...] = (checkpoint.layout, export.layout)
        plans: tuple[WritePlan, ...] = (joint.checkpoint, joint.hf)
        if what == "step":
            layouts = (as_one(export.layout, checkpoint.layout),)
            plans = (share_as_one(joint, layouts[0], plan_id=self._next_id()).plan,)
        return _Staging(
            layouts=layouts,
            plans=plans,
            copies=joint.copies,
            envelopes=joint.envelopes,
            tensors=joint.tensors,
            blocks=joint.blocks,
            gathers=joint.gathers,
            compute=joint.compute,
            exchanges=export.exchanges,
        )

    def _next_id(self) -> int:
        self._plans += 1
        return self._plans

    def _provide(self) -> None:
        """An arena that is large enough, a live writer, and the plans of all stagings in it."""
        needed_bytes = max(plan.arena_bytes for plan in self._write_plans())
        if self._arena is None or self._arena.size_bytes < needed_bytes:
            self._free_arena()
            self._arena = Arena(needed_bytes)
        if self._writer is None or not self._writer.alive:
            if self._writer is not None:
                self._writer.close()
            self._writer = WriterClient(limits=self._limits)
        self._writer.set_plans(self._write_plans(), self._arena.fd)
        for staging in self._stagings.values():
            if staging.snapshotter is None:
                staging.snapshotter = Snapshotter(
                    staging.tensors,
                    staging.copies,
                    staging.envelopes,
                    self._arena,
                    reshuffles=staging.reshuffles,
                    blocks=staging.blocks,
                    peers=self._peers,
                    gathers=staging.gathers,
                    compute=staging.compute,
                    bucket_bytes=staging.bucket_bytes,
                    meets=staging.exchanges,
                )

    def _write_plans(self) -> list[WritePlan]:
        return [plan for staging in self._stagings.values() for plan in staging.plans]

    def _free_arena(self) -> None:
        self._current = None
        for staging in self._stagings.values():
            staging.snapshotter = None  # it holds views of the arena, which keep the memory
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _files(self, what: What, train_state: bytes) -> list[Callable[[], tuple[InlineFile, ...]]]:
        files = [self.resumable.files(train_state)] if what != "hf" else []
        if what != "checkpoint":
            assert self.export is not None, "what needs an export was planned with one"
            files.append(self.export.files())
        if what != "step":
            return files
        beside_checkpoint, beside_export = files
        return [lambda: (*_inside(CHECKPOINT_PART, beside_checkpoint()), *_inside(EXPORT_PART, beside_export()))]


def _inside(directory_name: str, files: Sequence[InlineFile]) -> list[InlineFile]:
    return [replace(file, name=f"{directory_name}/{file.name}") for file in files]
