"""Models cut into the stages of a pipeline by hand, as trainers do it: each rank keeps the modules of its own part."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

CUTS = {1: [range(3)], 2: [range(2), range(2, 3)], 3: [range(1), range(1, 2), range(2, 3)]}
"""Which of 3 layers each stage has, by the number of stages."""


def stage_of(model: PreTrainedModel, stage: int, stages: int, *, ends: tuple[int, int] | None = None) -> Any:
    """`model` without what other stages have. Its layers keep their names; the ends are on the first and last stage."""
    first, last = ends or (0, stages - 1)
    keep = {str(layer) for layer in CUTS[stages][stage]}
    text: Any = model.model
    text.layers = nn.ModuleDict({name: layer for name, layer in text.layers.named_children() if name in keep})
    if stage != first:
        text.embed_tokens = None
    if stage != last:
        text.norm = None
        model.lm_head = None
    return model


def pipeline_mesh(stages: int) -> DeviceMesh:
    return init_device_mesh("cpu", (stages, dist.get_world_size() // stages), mesh_dim_names=("pp", "fsdp"))


def cut(model: PreTrainedModel, how: str) -> Any:
    """This rank's part: "pp2" alone, "pp2 fsdp" sharded over the stage's part of the job's mesh, "pp2 own" over a mesh
    of the stage's ranks alone; "fsdp": no stages."""
    kind, _, sharding = how.partition(" ")
    if kind == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    stages = int(kind.removeprefix("pp"))
    mesh = pipeline_mesh(stages)
    stage = mesh.get_local_rank("pp")
    model = stage_of(model, stage, stages)
    part = mesh["fsdp"] if sharding == "fsdp" else None
    if sharding == "own":
        per_stage = dist.get_world_size() // stages
        own = [DeviceMesh("cpu", [s * per_stage + r for r in range(per_stage)]) for s in range(stages)]
        part = own[stage]
    if part is not None:
        for layer in model.model.layers.values():
            fully_shard(layer, mesh=part)
        fully_shard(model, mesh=part)
    return model
