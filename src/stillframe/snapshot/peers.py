"""The other ranks, in a snapshot that all must take together: what is exchanged while the tensors stand still."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from stillframe.errors import StillframeError


class Peers:
    """Exchanges among all ranks through a process group of its own (gloo, on the CPU), made when first needed.

    Every rank comes to every meeting, with `meet` or `largest` or, if its snapshot has failed before, with `absent`,
    so that nobody waits for it. Every wait is bounded by `timeout_s`. After one that failed no other is begun: who came
    late would meet the others' next one. `was_met` says whether this rank has come to that of the present snapshot.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._group: dist.ProcessGroup | None = None
        self._broken: str | None = None
        self.was_met = False

    def meet(self, count: int, what: str) -> None:
        """Find out that all ranks are there, and have the same number of `what`. Blocks until they are.

        Raises StillframeError, on all ranks, where one is absent, or has another number; on those that wait, where one
        does not come in time.
        """
        failed_rank, most, least = self._all_reduce(torch.tensor([0, count, -count])).tolist()
        if failed_rank:
            raise StillframeError(f"rank {failed_rank - 1} failed in its snapshot, and its log says why")
        if most != -least:
            raise StillframeError(f"ranks share between {-least} and {most} {what}: their models differ")

    def largest(self, table: torch.Tensor) -> None:
        """Make each number in `table`, on the CPU, the largest that a rank has there. `meet`s the others first."""
        self.meet(len(table), "blocks of fp8")
        self._all_reduce(table)

    def send(self, content: torch.Tensor, rank: int) -> None:
        """Hand the bytes of `content`, contiguous and on the CPU, to `rank`, which must `receive` as many. After a
        `meet`. Blocks until they are on their way; raises StillframeError where they cannot be."""
        flat = content.view(-1).view(torch.uint8)
        self._bounded(lambda group: dist.send(flat, rank, group=group), f"hand tensors to rank {rank}")

    def receive(self, target: torch.Tensor, rank: int) -> None:
        """Fill `target`, contiguous and on the CPU, with what `rank` sends. After a `meet`. Blocks until it is there;
        raises StillframeError where it does not come in time."""
        flat = target.view(-1).view(torch.uint8)
        self._bounded(lambda group: dist.recv(flat, rank, group=group), f"get tensors from rank {rank}")

    def absent(self) -> None:
        """Tell the other ranks that this one's snapshot has failed."""
        if self._broken is None:
            self._all_reduce(torch.tensor([dist.get_rank() + 1, 0, 0]))

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            with suppress(ValueError):  # the job's groups, this one with them, were destroyed and made anew since
                dist.destroy_process_group(group)

    def _all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        self.was_met = True
        self._bounded(lambda group: dist.all_reduce(values, dist.ReduceOp.MAX, group=group), "meet the other ranks")
        return values

    def _bounded(self, exchange: Callable[[dist.ProcessGroup], object], what: str) -> None:
        if self._broken is not None:
            raise StillframeError(f"an exchange of this Checkpointer failed before ({self._broken}); make a new one")
        try:
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_s))
            exchange(self._group)
        except RuntimeError as error:
            self._broken = str(error).partition("\n")[0]
            raise StillframeError(
                f"this rank could not {what} within {self._timeout_s:.0f} s; did every rank call the save? Does "
                f"each still run? {self._broken}"
            ) from error
