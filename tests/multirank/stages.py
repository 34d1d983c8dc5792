"""Models cut into the stages of a pipeline by hand, as trainers do it: each rank keeps the modules of its own part."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

CUTS = {"pp2": [(0, 1), (2,)], "pp3": [(0,), (1,), (2,)], "v": [(0, 2), (1,)]}
"""Which of 3 layers each rank along "pp" has; in "v" the first has two stages, with both ends of the model."""


def stage_of(model: PreTrainedModel, kind: str, stage: int) -> Any:
    """`model` without what other stages have. Its layers keep their names; the ends are beside the outermost layers."""
    keep = {str(layer) for layer in CUTS[kind][stage]}
    text: Any = model.model
    text.layers = nn.ModuleDict({name: layer for name, layer in text.layers.named_children() if name in keep})
    if "0" not in keep:
        text.embed_tokens = None
    if "2" not in keep:
        text.norm = None
        model.lm_head = None
    return model


def pipeline_mesh(stages: int) -> DeviceMesh:
    return init_device_mesh("cpu", (stages, dist.get_world_size() // stages), mesh_dim_names=("pp", "fsdp"))


def cut(model: PreTrainedModel, how: str) -> Any:
    """This rank's part: "pp2" alone, "pp2 fsdp" sharded over the stage's part of the job's mesh, "pp2 own" over a mesh
    of the stage's ranks alone; "v": two stages on
    one rank; "fsdp": no stages."""
    kind, _, sharding = how.partition(" ")
    if kind == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    stages = len(CUTS[kind])
    mesh = pipeline_mesh(stages)
    stage = mesh.get_local_rank("pp")
    model = stage_of(model, kind, stage)
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
