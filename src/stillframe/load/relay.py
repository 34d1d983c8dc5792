"""Filling what ranks hold alike: each bucket is read by one of them and handed on from rank to rank.

From its reader a bucket goes to the next replica, from that to the one after, and so on around. While one is on its
way, its reader reads its next: so all read at the same time, and each rank sends and gets each byte at most once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from stillframe.errors import LoadError
from stillframe.load.computing import Filler
from stillframe.load.local import LocalMemory, cut_runs, own_rank
from stillframe.load.replicas import Alike, Bucket

T = TypeVar("T")

_WHOLE, _FAILED = 0, 1  # what the byte behind a bucket says of it


class Relay:
    """Fills the parts that this rank holds like others, together with them, over a process group of its own (gloo).

    On the host are two or three buckets at a time.
    """

    def __init__(self, filler: Filler, *, timeout_s: float) -> None:
        self._filler = filler
        self._timeout_s = timeout_s
        self._rank = own_rank()
        self._error: Exception | None = None
        self._is_over = False
        self._group: dist.ProcessGroup | None = None

    def fill(self, alike: Sequence[Alike]) -> bool:
        """Fill all that `alike` says, of which all ranks must have the same opinion; False where another rank failed.

        Every rank of the job calls this. A rank that cannot read goes on to take its part, with buckets that say so,
        and raises its error in the end. Raises LoadError where another rank does not come in time, or is gone.
        """
        timeout = timedelta(seconds=self._timeout_s)
        self._group = self._bounded(lambda: dist.new_group(backend="gloo", timeout=timeout), "meet the other ranks")
        try:
            # In one order on all ranks: whoever waits, waits for one who is at something that comes before.
            for one in sorted(alike, key=lambda one: one.replicas):
                self._fill(one)
        finally:
            dist.destroy_process_group(self._group)
            self._group = None
        if self._error is not None:
            raise self._error
        return not self._is_over

    def _fill(self, alike: Alike) -> None:
        own = iter([bucket for bucket in alike.buckets if bucket.reader == self._rank])
        memory: dict[int, LocalMemory] = {}
        with ThreadPoolExecutor(1, "stillframe-load") as pool:
            ahead = pool.submit(self._read, alike, next(own, None))
            for bucket in alike.buckets:
                if bucket.reader == self._rank:
                    content = ahead.result()
                    ahead = pool.submit(self._read, alike, next(own, None))
                else:
                    content = torch.empty(bucket.size_bytes + 1, dtype=torch.uint8, device="cpu")
                self._hand_on(content, alike.replicas, bucket.reader)
                if content[-1] == _FAILED:
                    self._is_over = True
                    return
                for piece in bucket.pieces:
                    target = alike.parts[piece.part][0].tensor
                    if piece.first == 0:
                        memory[piece.part] = LocalMemory(target)
                    flat = memory[piece.part].flat
                    flat[piece.first : piece.first + piece.count].copy_(piece.of(content))
                    if piece.first + piece.count == flat.numel():
                        memory.pop(piece.part).settle()

    def _read(self, alike: Alike, bucket: Bucket | None) -> torch.Tensor:
        if bucket is None:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        content = torch.empty(bucket.size_bytes + 1, dtype=torch.uint8, device="cpu")
        content[-1] = _WHOLE
        try:
            for piece in bucket.pieces:
                if not self._is_over:
                    runs = cut_runs(alike.parts[piece.part][1], piece.first, piece.count)
                    self._filler.fill(piece.of(content), runs)
        except Exception as error:  # noqa: BLE001 - raised in the end, by `fill`
            self._error, self._is_over = error, True
        if self._is_over:
            content[-1] = _FAILED
        return content

    def _hand_on(self, content: torch.Tensor, replicas: Sequence[int], reader: int) -> None:
        place, count = replicas.index(self._rank), len(replicas)
        distance = (place - replicas.index(reader)) % count
        before, after = replicas[place - 1], replicas[(place + 1) % count]
        if distance > 0:
            self._bounded(lambda: dist.recv(content, before, group=self._group), f"get tensors from rank {before}")
        if distance < count - 1:
            self._bounded(lambda: dist.send(content, after, group=self._group), f"hand tensors to rank {after}")

    def _bounded(self, exchange: Callable[[], T], what: str) -> T:
        try:
            return exchange()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            # Its frames keep the group alive, and with it connections on which the others would wait.
            error.with_traceback(None)
            raise LoadError(
                f"rank {self._rank} could not {what}; does each rank still run? (It waits {self._timeout_s:.0f} s at "
                f"most.) {reason}"
            ) from error
