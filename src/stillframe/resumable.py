"""What a checkpoint to resume from holds of one run: its plan, and the small files beside the tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from stillframe.commit.exchange import Exchange
from stillframe.errors import CorruptCheckpoint, OptionError
from stillframe.layout.companions import render_config
from stillframe.layout.describing import completed_tree, describe_tree, is_members
from stillframe.layout.distcp import DistcpPlan, plan_distcp
from stillframe.names import TRAIN_STATE_NAME, rank_state_name
from stillframe.records import InlineFile
from stillframe.snapshot.copy import Watched
from stillframe.staged import KnownStages
from stillframe.state.objects import Stateful, render_rank_state
from stillframe.state.tensors import WatchedOptimizers, objects_now, tree_of
from stillframe.tree import StateTree


class Resumable:
    """Plans model and optimizers as a DCP directory, with the states of `stateful` objects and the random state beside.

    Nothing is planned before the first `plan`: an optimizer has its state only after its first step. Raises
    UnsupportedModel for optimizers that are not the model's.
    """

    format = "checkpoint"

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizers: Sequence[Optimizer],
        stateful: Mapping[str, Stateful],
        save_frozen: bool,
        rank: int,
        world_size: int,
        exchange: Exchange | None = None,
    ) -> None:
        """`exchange`: with the other ranks, where each has a stage of the model."""
        self.model = model
        self.optimizers = tuple(optimizers)
        self.stateful = stateful
        self.save_frozen = save_frozen
        self._rank = rank
        self._world_size = world_size
        self._plan: DistcpPlan | None = None
        self._watched: tuple[Watched, WatchedOptimizers] | None = None
        self._frozen: list[bool] = []
        self._stages = None if exchange is None else KnownStages(exchange, self._described)
        self._whole: StateTree | None = None
        if self.optimizers:
            tree_of(model, self.optimizers, save_frozen=save_frozen)  # what is wrong is better found now than at a save

    def plan(self, plan_id: int) -> DistcpPlan:
        """Raises LayoutError where a tensor is distributed in a way that cannot be described exactly."""
        tree = tree_of(self.model, self.optimizers, save_frozen=self.save_frozen)
        stages = None
        if self._stages is not None:
            stages = self._stages.now()
            tree = self._whole = completed_tree(tree, stages)
        self._plan = plan_distcp(tree, rank=self._rank, world_size=self._world_size, plan_id=plan_id, stages=stages)
        self._watched = (Watched(self.model, tree.tensors), WatchedOptimizers(self.optimizers))
        self._frozen = self._frozen_now()
        return self._plan

    def meet(self) -> None:
        """Where each rank has a stage, exchange what they have; every rank calls this. Blocks until all have."""
        if self._stages is not None and self._stages.renew():
            self._watched = None

    @property
    def keys_of_others(self) -> frozenset[str]:
        """The keys of the model that other stages of the pipeline have, as of the last exchange."""
        return frozenset() if self._stages is None else self._stages.keys_of_others

    def _described(self) -> str:
        tree = tree_of(self.model, self.optimizers, save_frozen=self.save_frozen)
        return describe_tree(self.model, tree, rank=self._rank, world_size=self._world_size)

    def settle(self) -> None:
        """Bring the model's tensors into the state in which they are saved."""
        if self._watched is not None:
            self._watched[0].reshard()

    def unchanged(self) -> bool:
        """Whether model and optimizers are still what the last `plan` was made of; what was never planned is not."""
        if self._watched is None or self._frozen != self._frozen_now():
            return False
        return all(watched.unchanged() for watched in self._watched)

    def _frozen_now(self) -> list[bool]:
        """Which parameters are left out because they are frozen, where that counts."""
        return [] if self.save_frozen else [parameter.requires_grad for parameter in self.model.parameters()]

    def files(self, train_state: bytes) -> Callable[[], tuple[InlineFile, ...]]:
        """What is written beside the tensors, as it is now; what can be rendered later is when the result is called.

        Raises OptionError for the state of an object that could not be read back.
        """
        assert self._plan is not None, "a save is planned before its files are"
        metadata = self._plan.metadata
        own = InlineFile(name=rank_state_name(self._rank), content=render_rank_state(self.stateful))
        if metadata is None:
            return lambda: (own,)
        beside = [own, InlineFile(name=TRAIN_STATE_NAME, content=train_state)]
        if isinstance(self.model, PreTrainedModel):
            beside += [f for f in render_config(self.model, self.model.dtype) if f.name == "config.json"]
        objects = objects_now(self.model, self.optimizers)
        if self._whole is not None:
            objects |= {key: value for key, value in self._whole.objects.items() if is_members(self._whole.paths[key])}
        return lambda: (*beside, *metadata.render(objects))


def encode_train_state(step: int, train_state: Mapping[str, Any] | None) -> bytes:
    """`train_state` as JSON, with the step; raises OptionError for what JSON cannot hold exactly."""
    try:
        state = {"step": step, **(train_state or {})}
        if state["step"] != step:
            raise ValueError(f"its step is {state['step']}, the save's {step}")
        text = json.dumps(state, indent=1, allow_nan=False)
        if json.loads(text) != state:
            raise ValueError("it holds something that JSON changes, such as a tuple or a key that is no text")
    except (TypeError, ValueError) as error:
        raise OptionError(f"train_state must be a dict of numbers, text, lists and dicts: {error}") from error
    return (text + "\n").encode()


def decode_train_state(content: bytes, path: Path) -> dict[str, Any]:
    """What `encode_train_state` made this of; raises CorruptCheckpoint, naming `path`."""
    try:
        state = json.loads(content)
        if not isinstance(state, dict):
            raise TypeError(f"it is a {type(state).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: is not the JSON of a train state: {error}") from error
    return state
