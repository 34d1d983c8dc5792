"""What ranks tell each other in a snapshot: of each block that several of them hold parts of, the largest value."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from stillframe.errors import StillframeError


class SharedMaxima:
    """Finds maxima over all ranks, through a process group of its own (gloo, on the CPU), made when first needed.

    Every rank comes to every exchange, with `largest` or, if its snapshot has failed before, with `absent`, so that
    nobody waits for it. Every wait is bounded by `timeout_s`. After one that failed no other is begun: who came late
    would meet the others' next one. `was_met` says whether this rank has come to that of the present snapshot.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._group: dist.ProcessGroup | None = None
        self._broken: str | None = None
        self.was_met = False

    def largest(self, table: torch.Tensor) -> None:
        """Make each number in `table`, on the CPU, the largest that a rank has there. Blocks until all ranks come.

        Raises StillframeError, on all ranks, where one is absent, or has a table of another length; on those that wait,
        where one does not come in time.
        """
        failed_rank, most, least = self._all_reduce(torch.tensor([0, len(table), -len(table)])).tolist()
        if failed_rank:
            raise StillframeError(f"rank {failed_rank - 1} failed in its snapshot, and its log says why")
        if most != -least:
            raise StillframeError(f"ranks share between {-least} and {most} blocks of fp8: their models differ")
        self._all_reduce(table)

    def absent(self) -> None:
        """Tell the other ranks that this one's snapshot has failed."""
        if self._broken is None:
            self._all_reduce(torch.tensor([dist.get_rank() + 1, 0, 0]))

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    def _all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        self.was_met = True
        if self._broken is not None:
            raise StillframeError(f"an exchange of this Checkpointer failed before ({self._broken}); make a new one")
        try:
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_s))
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            self._broken = str(error).partition("\n")[0]
            raise StillframeError(
                f"the ranks could not exchange the maxima of their fp8 blocks within {self._timeout_s:.0f} s; did "
                f"every rank call the save? {self._broken}"
            ) from error
        return values
