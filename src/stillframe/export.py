"""What is exported of one model: its plan, made again when the model changes, and the files beside the weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from stillframe.commit.exchange import Exchange
from stillframe.errors import OptionError, UnsupportedModel
from stillframe.layout.adapters import is_peft_model, plan_adapters, render_adapters, saved_adapters
from stillframe.layout.casting import Cast
from stillframe.layout.companions import render_companion, render_config
from stillframe.layout.describing import describe_adapters, describe_model
from stillframe.layout.huggingface import HuggingFacePlan, plan_huggingface
from stillframe.layout.quantizing import quantization_config
from stillframe.layout.renaming import KeyMapping
from stillframe.layout.runtime import unwrapped
from stillframe.names import MANIFEST_NAME, WORK_DIR_NAME
from stillframe.patches import BLOCK
from stillframe.records import Blocks, InlineFile, Layout
from stillframe.snapshot.copy import Watched
from stillframe.staged import KnownStages
from stillframe.wrappers import unwrapped_module

_log = logging.getLogger("stillframe")

# What from_pretrained of transformers or PEFT would load weights from.
_WEIGHTS_NAME = re.compile(r"(adapter_)?model([.-].*)?\.(safetensors|bin)(\.index\.json)?|pytorch_model.*\.bin(\..*)?")

_log = logging.getLogger("stillframe")


class Export:
    """Plans `model` as a Hugging Face directory, with the files of its `companions` (tokenizer, processor) beside.

    Of a model with PEFT's adapters only those are saved, as PEFT does it; that may change from plan to plan.

    A module that is no PreTrainedModel has no config of its own; `config` may stand in for it. Raises LayoutError where
    the model, its config or a companion cannot be saved, OptionError for a `config` that is one too many, or for a
    `key_mapping` or `hub_layout` of adapters, which PEFT could not read.
    """

    format = "hf"

    def __init__(
        self,
        model: nn.Module,
        *,
        config: Any,
        companions: tuple[Any, ...],
        key_mapping: KeyMapping | None,
        hub_layout: bool,
        per_rank: bool,
        max_shard_bytes: int,
        cast: Cast | None,
        rank: int,
        world_size: int,
        exchange: Exchange | None = None,
    ) -> None:
        """`exchange`: with the other ranks, where each has a stage of the model."""
        model = _exported(model, any_module=key_mapping is not None)
        if config is not None and (isinstance(model, PreTrainedModel) or is_peft_model(model)):
            raise OptionError(f"config is for modules that have none; {type(model).__name__} is saved with its own")
        self._model = model
        self._key_mapping = key_mapping
        self._hub_layout = hub_layout
        self._per_rank = per_rank
        self._max_shard_bytes = max_shard_bytes
        self._cast = cast
        self._rank = rank
        self._world_size = world_size
        self._stages = None
        if exchange is not None:
            self._stages = KnownStages(exchange, self._describe)
        self._companion_files: tuple[InlineFile, ...] = ()
        self._plan: HuggingFacePlan | None = None
        self._watched: Watched | None = None
        self._adapters: tuple[str, ...] = ()
        if rank == 0:
            if isinstance(model, PreTrainedModel) and not saved_adapters(model):
                render_config(model, model.dtype)  # a config that cannot be saved is better found now than at a save
            rendered = (config, *companions)
            self._companion_files = tuple(f for c in rendered if c is not None for f in render_companion(c))

    def plan(self, plan_id: int, *, may_reshuffle: bool) -> HuggingFacePlan:
        """With `may_reshuffle`, tensors whose shards are short runs are exchanged among ranks when they are copied."""
        adapters = saved_adapters(self._model)
        plan = self._plan_adapters(plan_id) if adapters else self._plan_model(plan_id, may_reshuffle=may_reshuffle)
        _refuse_taken_names(plan.layout, self._companion_files)
        if self._plan is None and self._rank == 0 and plan.blocks is not None:
            _tell_of_partial_blocks(plan.blocks)
        self._plan = plan
        self._adapters = adapters
        self._watched = Watched(self._model, plan.tensors)
        if self._rank == 0 and (done := plan.layout.reshuffled) is not None:
            _log.info(
                "exports exchange %d tensors of %d bytes among ranks, in buckets of %d bytes: their shards are cut "
                "across rows",
                done.tensors,
                done.size_bytes,
                done.bucket_bytes,
            )
            _log.debug("exchanged: %s", ", ".join(reshuffle.tensor for reshuffle in plan.share.reshuffles))
        return plan

    def _plan_model(self, plan_id: int, *, may_reshuffle: bool) -> HuggingFacePlan:
        return plan_huggingface(
            self._model,
            max_shard_bytes=self._max_shard_bytes,
            cast=self._cast,
            key_mapping=self._key_mapping,
            hub_layout=self._hub_layout,
            per_rank=self._per_rank,
            rank=self._rank,
            world_size=self._world_size,
            plan_id=plan_id,
            stages=None if self._stages is None else self._stages.now(),
            may_reshuffle=may_reshuffle,
        )

    def _plan_adapters(self, plan_id: int) -> HuggingFacePlan:
        if self._key_mapping is not None:
            raise OptionError(
                "key_mapping has no place in the export of adapters, whose keys PEFT looks for; leave it out"
            )
        if self._per_rank:
            raise OptionError(
                "file_naming='per_rank' has no place in the export of adapters, whose file PEFT looks for; leave it out"
            )
        if self._hub_layout:
            raise OptionError("layout='hub' has no place in the export of adapters, which have one; leave it out")
        if self._cast is not None and self._cast.fp8_but is not None:
            raise OptionError("save_dtype='fp8' has no place in the export of adapters, which PEFT does not read in it")
        plan = plan_adapters(
            self._model,
            max_shard_bytes=self._max_shard_bytes,
            cast=self._cast,
            rank=self._rank,
            world_size=self._world_size,
            plan_id=plan_id,
            stages=None if self._stages is None else self._stages.now(),
        )
        if self._rank == 0:
            render_adapters(self._model)  # likewise: better found now than at a save
        return plan

    def _describe(self) -> str:
        describe = describe_adapters if saved_adapters(self._model) else describe_model
        return describe(self._model, rank=self._rank, world_size=self._world_size)

    def meet(self) -> None:
        """Where each rank has a stage, exchange what they have; every rank calls this. Blocks until all have."""
        if self._stages is not None and self._stages.renew():
            self._watched = None

    def settle(self) -> None:
        """Bring the model's tensors into the state in which they are saved."""
        if self._watched is not None:
            self._watched.reshard()

    def unchanged(self) -> bool:
        """Whether the model is still what the last `plan` was made of; one that was never planned is not."""
        if self._watched is None or not self._watched.unchanged():
            return False
        return saved_adapters(self._model) == self._adapters

    def files(self) -> Callable[[], tuple[InlineFile, ...]]:
        """What rank 0 writes beside the weights, as the model is now (other ranks: nothing)."""
        assert self._plan is not None, "a save is planned before its files are"
        if self._rank != 0:
            return tuple
        config_files: tuple[InlineFile, ...] = ()
        if self._adapters:
            config_files = render_adapters(self._model)
        elif isinstance(self._model, PreTrainedModel):
            assert self._plan.config_dtype is not None, "a PreTrainedModel has a dtype"
            left_alone = self._plan.left_alone
            quantization = None if left_alone is None else quantization_config(left_alone)
            config_files = render_config(self._model, self._plan.config_dtype, quantization)
        files = {f.name: f for f in (*config_files, *self._plan.layout.inline_files, *self._companion_files)}
        return lambda: tuple(files.values())


def _exported(model: nn.Module, *, any_module: bool) -> nn.Module:
    """What `model` is around: a PeftModel, which is a wrapper of its own kind, or what `unwrapped` finds."""
    inner = unwrapped_module(model)
    return inner if is_peft_model(inner) else unwrapped(inner, any_module=any_module)


def _refuse_taken_names(layout: Layout, companion_files: tuple[InlineFile, ...]) -> None:
    """Raise UnsupportedModel if a tokenizer's or processor's file has the name of one that stillframe writes, or that
    would be loaded instead of what it writes: one file of weights beside shards, an index beside one file."""
    taken = {MANIFEST_NAME, *(f.name for f in layout.files), *(f.name for f in layout.inline_files), *layout.held_back}
    for file in companion_files:
        is_taken = file.name in taken - {"config.json"} or _WEIGHTS_NAME.fullmatch(file.name) is not None
        if is_taken or file.name.partition("/")[0] == WORK_DIR_NAME:
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
