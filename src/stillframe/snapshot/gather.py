"""Bringing tensors to one rank while they are staged (`layout.gather` plans it), in buckets of a bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from stillframe.errors import StillframeError
from stillframe.records import Gather, Piece
from stillframe.snapshot.peers import Peers

Compute = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.dtype]], dict[str, torch.Tensor]]


class Gatherer:
    """Takes this rank's part in `gathers`. `compute` makes of whole tensors what a conversion makes of them.

    Tensors travel over the host. Besides a bucket, a sender needs nothing, on the device as little as on the host; an
    owner has one gather's tensors on the host, and what is computed of them, until they are copied.
    """

    def __init__(
        self,
        gathers: Sequence[Gather],
        tensors: Mapping[str, torch.Tensor],
        compute: Compute | None,
        peers: Peers | None,
        *,
        bucket_bytes: int,
    ) -> None:
        self._gathers = gathers
        self._tensors = tensors
        self._compute = compute
        self._peers = peers
        self._bucket_bytes = bucket_bytes

    def arrivals(self) -> Iterator[dict[str, torch.Tensor]]:
        """Of each gather that this rank owns the whole tensors, by name, computed ones too; valid until the next.

        All ranks must go through all of theirs. Blocks for the others; raises StillframeError where one does not come.
        """
        for gather in self._gathers:
            if gather.tensors or gather.computed:
                yield self._arrived(gather)
            else:
                for piece in gather.pieces:
                    self._send(piece, gather.owner)

    def _send(self, piece: Piece, owner: int) -> None:
        assert self._peers is not None, "there is somebody to send to"
        local = _box(_local(self._tensors[piece.tensor]), piece.local_offsets, piece.sizes)
        for part in in_parts(local, self._bucket_bytes):
            self._peers.send(part.cpu().contiguous(), owner)

    def _arrived(self, gather: Gather) -> dict[str, torch.Tensor]:
        whole: dict[str, torch.Tensor] = {}
        coming = {piece.tensor for piece in gather.pieces}
        for name in gather.tensors:
            tensor = self._tensors[name]
            if name in coming or not tensor.numel():
                whole[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            else:
                whole[name] = _local(tensor).cpu()
        me = dist.get_rank() if coming else 0
        for piece in gather.pieces:
            target = _box(whole[piece.tensor], piece.offsets, piece.sizes)
            if piece.sender == me:
                target.copy_(_box(_local(self._tensors[piece.tensor]), piece.local_offsets, piece.sizes))
            else:
                self._receive(target, piece.sender)
        if not gather.computed:
            return whole
        assert self._compute is not None, "what is computed comes with a conversion"
        wanted = {name: self._tensors[name].dtype for name in gather.computed}
        made = self._compute(whole, wanted)
        for name, tensor in made.items():
            expected = self._tensors[name]
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise StillframeError(
                    f"{name}: the conversion made {tuple(tensor.shape)} {tensor.dtype} of it, and "
                    f"{tuple(expected.shape)} {expected.dtype} when it was laid out"
                )
        return whole | made

    def _receive(self, target: torch.Tensor, sender: int) -> None:
        assert self._peers is not None, "there is somebody to get it from"
        for part in in_parts(target, self._bucket_bytes):
            if part.is_contiguous():
                self._peers.receive(part, sender)
            else:
                bucket = torch.empty(part.shape, dtype=part.dtype)
                self._peers.receive(bucket, sender)
                part.copy_(bucket)


def in_parts(tensor: torch.Tensor, most_bytes: int) -> Iterator[torch.Tensor]:
    """Views that tile `tensor` in row-major order, none of more than `most_bytes`, or one element."""
    if not tensor.numel():
        return
    if tensor.nbytes <= most_bytes or tensor.numel() == 1:
        yield tensor
        return
    dim = next(d for d, size in enumerate(tensor.shape) if size > 1)
    row_bytes = tensor.nbytes // tensor.shape[dim]
    rows = max(1, most_bytes // row_bytes)
    for first in range(0, tensor.shape[dim], rows):
        yield from in_parts(tensor.narrow(dim, first, min(rows, tensor.shape[dim] - first)), most_bytes)


def _box(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()
