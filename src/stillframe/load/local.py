"""This rank's part of a tensor, and where its elements come from."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from stillframe.layout.placement import Holding, Holdings
from stillframe.layout.runs import Runs, overlap


def own_holdings(*, any_mesh: bool = True) -> Holdings:
    """What this rank of the job holds; of a job of one where `torch.distributed` is not initialised. Without
    `any_mesh`, also which other ranks hold the same."""
    world_size = dist.get_world_size() if _is_distributed() else 1
    return Holdings(rank=own_rank(), world_size=world_size, any_mesh=any_mesh)


def own_rank() -> int:
    """This rank's number in the job."""
    return dist.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def local_runs(runs: Runs, held: Holding) -> Runs:
    """The part of `runs`, over a whole tensor, that this rank holds, as runs over its local tensor."""
    mine = held.runs
    a, b, start, length = overlap(runs.start, runs.length, mine.start, mine.length)
    into = mine.source_start[b] + (start - mine.start[b])
    return Runs(into, runs.source[a], runs.source_start[a] + (start - runs.start[a]), length)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor, any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def cut_runs(runs: Runs, low: int, size: int) -> Runs:
    """The part of `runs` that fills elements `low` to `low + size`, counted from `low`."""
    r, _, start, length = overlap(runs.start, runs.length, np.array([low]), np.array([size]))
    return Runs(start - low, runs.source[r], runs.source_start[r] + (start - runs.start[r]), length)


class LocalMemory:
    """This rank's part of a tensor as `flat` memory, to be filled; in place once it is `settle`d."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._local = local_part(tensor).detach()
        self._values = self._local
        if not self._local.is_contiguous():
            self._values = torch.empty(self._local.shape, dtype=self._local.dtype, device=self._local.device)
        self.flat = self._values.view(-1)

    def settle(self) -> None:
        """Copy what is not there already to where it belongs."""
        if self._values is not self._local:
            self._local.copy_(self._values)
