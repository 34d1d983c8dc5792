"""What is exported of one model: its plan, made again when the model changes, and the files beside the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from stillframe.errors import OptionError, UnsupportedModel
from stillframe.layout.casting import Cast
from stillframe.layout.companions import render_companion, render_config
from stillframe.layout.huggingface import HuggingFacePlan, plan_huggingface
from stillframe.layout.quantizing import quantization_config
from stillframe.layout.renaming import KeyMapping
from stillframe.names import MANIFEST_NAME, WORK_DIR_NAME
from stillframe.patches import BLOCK
from stillframe.records import Blocks, InlineFile, Layout
from stillframe.snapshot.copy import Watched

_log = logging.getLogger("stillframe")


class Export:
    """Plans `model` as a Hugging Face directory, with the files of its `companions` (tokenizer, processor) beside.

    A module that is no PreTrainedModel has no config of its own; `config` may stand in for it. Raises LayoutError where
    the model, its config or a companion cannot be saved, OptionError for a `config` that is one too many.
    """

    format = "hf"

    def __init__(
        self,
        model: nn.Module,
        *,
        config: Any,
        companions: tuple[Any, ...],
        key_mapping: KeyMapping | None,
        max_shard_bytes: int,
        cast: Cast | None,
        rank: int,
        world_size: int,
    ) -> None:
        if config is not None and isinstance(model, PreTrainedModel):
            raise OptionError(f"config is for modules that have none; {type(model).__name__} is saved with its own")
        self._model = model
        self._key_mapping = key_mapping
        self._max_shard_bytes = max_shard_bytes
        self._cast = cast
        self._rank = rank
        self._world_size = world_size
        self._companion_files: tuple[InlineFile, ...] = ()
        self._plan: HuggingFacePlan | None = None
        self._watched: Watched | None = None
        if rank == 0:
            if isinstance(model, PreTrainedModel):
                render_config(model, model.dtype)  # a config that cannot be saved is better found now than at a save
            rendered = (config, *companions)
            self._companion_files = tuple(f for c in rendered if c is not None for f in render_companion(c))

    def plan(self, plan_id: int) -> HuggingFacePlan:
        plan = plan_huggingface(
            self._model,
            max_shard_bytes=self._max_shard_bytes,
            cast=self._cast,
            key_mapping=self._key_mapping,
            rank=self._rank,
            world_size=self._world_size,
            plan_id=plan_id,
        )
        _refuse_taken_names(plan.layout, self._companion_files)
        if self._plan is None and self._rank == 0 and plan.blocks is not None:
            _tell_of_partial_blocks(plan.blocks)
        self._plan = plan
        self._watched = Watched(self._model, plan.tensors)
        return plan

    def settle(self) -> None:
        """Bring the model's tensors into the state in which they are saved."""
        if self._watched is not None:
            self._watched.reshard()

    def unchanged(self) -> bool:
        """Whether the model is still what the last `plan` was made of; one that was never planned is not."""
        return self._watched is not None and self._watched.unchanged()

    def files(self) -> Callable[[], tuple[InlineFile, ...]]:
        """What rank 0 writes beside the weights, as the model is now (other ranks: nothing)."""
        assert self._plan is not None, "a save is planned before its files are"
        if self._rank != 0:
            return tuple
        config_files: tuple[InlineFile, ...] = ()
        if isinstance(self._model, PreTrainedModel):
            assert self._plan.config_dtype is not None, "a PreTrainedModel has a dtype"
            left_alone = self._plan.left_alone
            quantization = None if left_alone is None else quantization_config(left_alone)
            config_files = render_config(self._model, self._plan.config_dtype, quantization)
        files = {f.name: f for f in (*config_files, *self._plan.layout.inline_files, *self._companion_files)}
        return lambda: tuple(files.values())


def _refuse_taken_names(layout: Layout, companion_files: tuple[InlineFile, ...]) -> None:
    """Raise UnsupportedModel if a tokenizer's or processor's file has the name of one that stillframe writes."""
    taken = {MANIFEST_NAME, *(f.name for f in layout.files), *(f.name for f in layout.inline_files)}
    for file in companion_files:
        if file.name in taken or file.name.partition("/")[0] == WORK_DIR_NAME:
            raise UnsupportedModel(f"the tokenizer or processor saves a file {file.name!r}, a name that is taken")


def _tell_of_partial_blocks(blocks: Blocks) -> None:
    """Where sizes are no multiples of 128, transformers 5.23 misreads the format when it loads without a GPU."""
    partial = sorted(name for name, m in blocks.matrices.items() if m.rows % BLOCK or m.columns % BLOCK)
    if partial:
        _log.warning(
            "fp8: the sizes of %d weights, such as %s, are no multiples of %d. load_hf reads them right, but where "
            "transformers converts them back to bfloat16 (as it does without a GPU), it refuses them or, worse, takes "
            "wrong blocks; keep_in_bf16 leaves them as they are",
            len(partial),
            partial[0],
            BLOCK,
        )
