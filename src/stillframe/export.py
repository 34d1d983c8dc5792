"""The export of one model: its plan, and what the plan needs to be carried out again and again."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from stillframe.errors import UnsupportedModel
from stillframe.layout.casting import Cast
from stillframe.layout.companions import render_companion, render_config
from stillframe.layout.huggingface import plan_huggingface
from stillframe.names import MANIFEST_NAME, WORK_DIR_NAME
from stillframe.records import InlineFile, Layout
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.copy import Snapshotter, Watched
from stillframe.writer.client import WriterClient


class Export:
    """Plans `model` as a Hugging Face directory, holds the arena and the writer process, takes the snapshots.

    The plan is made once and reused while the model keeps its tensors; when it does not (adapters merged, layers
    swapped), the next `snapshot` plans anew. One thread at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        companions: tuple[Any, ...],
        max_shard_bytes: int,
        cast: Cast | None,
        rank: int,
        world_size: int,
    ) -> None:
        """Plan, allocate, start the writer. Raises LayoutError, StillframeError, or the writer's WriterError."""
        self._model = model
        self._max_shard_bytes = max_shard_bytes
        self._cast = cast
        self._rank = rank
        self._world_size = world_size
        self._companion_files: tuple[InlineFile, ...] = ()
        if rank == 0:
            render_config(model, model.dtype)  # a config that cannot be saved is better found now than at a save
            self._companion_files = tuple(file for c in companions for file in render_companion(c))
        self._plans = 0
        self._arena: Arena | None = None
        self._writer: WriterClient | None = None
        self._snapshotter: Snapshotter | None = None
        try:
            with torch.inference_mode(False):
                self._prepare()
            self._refuse_taken_names()
        except BaseException:
            self.close()
            raise

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def plan_id(self) -> int:
        return self._plans

    @property
    def writer(self) -> WriterClient:
        assert self._writer is not None, "an Export that was made has a writer until it is closed"
        return self._writer

    @property
    def staged_bytes(self) -> int:
        """This rank's bytes of a snapshot."""
        return self._staged_bytes

    def snapshot(self) -> tuple[InlineFile, ...]:
        """Copy this rank's share into the arena, and return the files that rank 0 writes beside (others: none).

        Blocks for the copy. The arena must not be in use by the writer.
        """
        self._watched.reshard()
        if self._snapshotter is None or not self._watched.unchanged() or not self.writer.alive:
            with torch.inference_mode(False):  # the plan outlives the block that the save may be called in
                self._prepare()
        assert self._snapshotter is not None, "a plan that was made has one"
        self._snapshotter.copy()
        if self._rank != 0:
            return ()
        config_files = render_config(self._model, self._config_dtype)
        files = {f.name: f for f in (*config_files, *self._layout.inline_files, *self._companion_files)}
        return tuple(files.values())

    def close(self) -> None:
        """End the writer process and free the arena; waits for neither longer than the writer's own bounds."""
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self._free_arena()

    def _free_arena(self) -> None:
        self._snapshotter = None  # it holds views of the arena, which keep the memory
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _refuse_taken_names(self) -> None:
        """Raise UnsupportedModel if a tokenizer's or processor's file has the name of one that stillframe writes."""
        taken = {MANIFEST_NAME, *(f.name for f in self._layout.files), *(f.name for f in self._layout.inline_files)}
        for file in self._companion_files:
            if file.name in taken or file.name.partition("/")[0] == WORK_DIR_NAME:
                raise UnsupportedModel(f"the tokenizer or processor saves a file {file.name!r}, a name that is taken")

    def _prepare(self) -> None:
        plan = plan_huggingface(
            self._model,
            max_shard_bytes=self._max_shard_bytes,
            cast=self._cast,
            rank=self._rank,
            world_size=self._world_size,
            plan_id=self._plans + 1,
        )
        share = plan.share
        if self._arena is None or self._arena.size_bytes < share.plan.arena_bytes:
            self._free_arena()
            self._arena = Arena(share.plan.arena_bytes)
        if self._writer is None or not self._writer.alive:
            if self._writer is not None:
                self._writer.close()
            self._writer = WriterClient()
        self._writer.set_plans([share.plan], self._arena.fd)
        self._snapshotter = Snapshotter(plan.tensors, share.copies, share.envelopes, self._arena)
        self._staged_bytes = self._snapshotter.staged_bytes
        self._watched = Watched(self._model, plan.tensors)
        self._layout = plan.layout
        self._config_dtype = plan.config_dtype
        self._plans += 1
