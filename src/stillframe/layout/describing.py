"""What a rank tells the others of the tensors that it has, where ranks have different ones (`stages`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from stillframe.errors import UnsupportedModel
from stillframe.layout.adapters import selected_tensors
from stillframe.layout.placement import Holdings
from stillframe.layout.runtime import refuse_unsupported, runtime_tensors, twins_on_meta
from stillframe.layout.stages import Stages, encode, in_whole_model, merged
from stillframe.ties import tied_elsewhere
from stillframe.tree import KeyPath, StateTree
from stillframe.wrappers import clean_name, without_wrappers


def describe_model(model: nn.Module, *, rank: int, world_size: int) -> str:
    """This rank's part of a model that is exported. Raises LayoutError as a plan of it would."""
    with without_wrappers(model):
        refuse_unsupported(model)
        tensors = in_whole_model(model, runtime_tensors(model))
        saved = {id(tensor) for tensor in tensors.values()}
        parameters = dict(model.named_parameters())
    uncounted = {name: p.numel() for name, p in parameters.items() if id(p) not in saved}
    ids = {id(parameter) for parameter in parameters.values()}
    is_parameter = {name: id(tensor) in ids for name, tensor in tensors.items()}
    return _described(model, tensors, is_parameter, {"uncounted": uncounted}, rank=rank, world_size=world_size)


def describe_adapters(model: nn.Module, *, rank: int, world_size: int) -> str:
    """This rank's part of a model with PEFT's adapters, of which only these are exported. Raises like a plan."""
    with without_wrappers(model):
        selection, tensors = selected_tensors(model)
        parameters = in_whole_model(model, dict(model.named_parameters()))
    ids = {id(parameter) for parameter in parameters.values()}
    saved = {id(tensor) for tensor in tensors.values()}
    extra = {
        "adapters": selection,
        "uncounted": {name: p.numel() for name, p in parameters.items() if id(p) not in saved},
    }
    is_parameter = {name: id(tensor) in ids for name, tensor in tensors.items()}
    # So that a rank without adapters does not pass for one with them.
    return _described(model, tensors, is_parameter, extra, rank=rank, world_size=world_size, kind=" with adapters")


def describe_tree(model: nn.Module, tree: StateTree, *, rank: int, world_size: int) -> str:
    """This rank's part of what is checkpointed, with aliases, objects and the ways to them."""
    # As in `in_whole_model`: where these stand in the whole model is for the stage to say that they are tied to.
    foreign = set(tied_elsewhere(model, {clean_name(name) for name in model.state_dict(keep_vars=True)}).values())

    def members(key: str, value: Any) -> list[str] | None:
        return sorted(value, key=lambda name: name not in foreign) if is_members(tree.paths[key]) else None

    shared = {key: key not in tree.rank_0_only for key in tree.tensors}
    extra = {
        "aliases": dict(tree.aliases),
        "paths": {key: list(path) for key, path in tree.paths.items()},
        "objects": {key: members(key, value) for key, value in tree.objects.items()},
    }
    return _described(model, tree.tensors, shared, extra, rank=rank, world_size=world_size)


def _described(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    is_parameter: Mapping[str, bool],
    extra: Mapping[str, Any],
    *,
    rank: int,
    world_size: int,
    kind: str = "",
) -> str:
    held = Holdings(rank=rank, world_size=world_size, any_mesh=True)
    twins = twins_on_meta(tensors)
    cls = type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)
    return encode(
        cls.__name__ + kind,
        {
            name: (twins[name], is_parameter[name], held.distribution(name, t) if isinstance(t, DTensor) else None)
            for name, t in tensors.items()
        },
        extra,
    )


def completed_tree(tree: StateTree, stages: Stages) -> StateTree:
    """The whole state, of which `tree` is this rank's part. Raises UnsupportedModel, naming key and rank, where ranks
    have different values that are no tensors: only rank 0's are saved."""
    first = stages.extras[0]
    for extra, rank in zip(stages.extras, stages.first_ranks, strict=True):
        if different := sorted(extra["objects"].keys() ^ first["objects"].keys()):
            key = different[0]
            has, lacks = (rank, stages.first_ranks[0]) if key in extra["objects"] else (stages.first_ranks[0], rank)
            raise UnsupportedModel(
                f"{key}: rank {has} has this value, which is no tensor, and rank {lacks} has it not; the optimizers of "
                "all stages of a pipeline must have the same groups (some may be empty), and tensors for parameters"
            )
    tensors = stages.completed(tree.tensors)
    aliases = {alias: key for extra in stages.extras for alias, key in extra["aliases"].items() if alias not in tensors}
    paths = {key: tuple(path) for extra in stages.extras for key, path in extra["paths"].items()}
    members = {
        key: merged([extra["objects"][key] for extra in stages.extras])
        for key, value in first["objects"].items()
        if value is not None
    }
    return StateTree(
        tensors=tensors,
        aliases=aliases,
        rank_0_only=frozenset(key for key, member in stages.items() if not member.is_parameter),
        objects={**tree.objects, **members},
        paths={key: paths[key] for key in merged([list(extra["paths"]) for extra in stages.extras])},
    )


def is_members(path: KeyPath) -> bool:
    """Whether that is where an optimizer's group lists the names of its parameters."""
    return len(path) == 4 and path[1] == "param_groups" and path[3] == "params"
