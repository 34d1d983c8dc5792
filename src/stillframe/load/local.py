"""This rank's part of a tensor, and where its elements come from."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from stillframe.layout.placement import Holding, Holdings
from stillframe.layout.runs import Runs, overlap


def own_holdings() -> Holdings:
    """What this rank of the job holds; of a job of one where `torch.distributed` is not initialised."""
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    return Holdings(rank=rank, world_size=world_size, any_mesh=True)


def local_runs(runs: Runs, held: Holding) -> Runs:
    """The part of `runs`, over a whole tensor, that this rank holds, as runs over its local tensor."""
    mine = held.runs
    a, b, start, length = overlap(runs.start, runs.length, mine.start, mine.length)
    into = mine.source_start[b] + (start - mine.start[b])
    return Runs(into, runs.source[a], runs.source_start[a] + (start - runs.start[a]), length)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor, any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
