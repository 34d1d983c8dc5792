"""The exchange of rows among the ranks that share them (`layout.reshuffle` plans it), bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from stillframe.records import Reshuffle


class Exchange:
    """The buffers of one snapshot's exchanges: three of a bucket's size on each device, however large the tensors."""

    def __init__(self, reshuffles: Sequence[Reshuffle], tensors: Mapping[str, torch.Tensor]) -> None:
        self._size_bytes = max((_bucket_bytes(r, tensors[r.tensor].dtype) for r in reshuffles), default=0)
        self._buffers: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def buckets(self, reshuffle: Reshuffle, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows of `tensor` that this rank gets to own: bucket after bucket, each flat, valid until the next.

        All members of the group along the mesh dimension must take all buckets, in the same order of tensors. Each one
        blocks for the slowest of them, at most as long as the timeout of their process group; raises what that raises.
        """
        assert isinstance(tensor, DTensor), "what is exchanged is sharded"
        mesh, local = tensor.device_mesh, tensor._local_tensor.detach()
        group = mesh.get_group(reshuffle.mesh_dim)
        # A group numbers its members by their ranks, which in a mesh may stand in any order.
        order = sorted(range(len(reshuffle.members)), key=lambda m: dist.get_group_rank(group, reshuffle.members[m]))
        me = reshuffle.members.index(dist.get_rank())
        # Shards that are kept on the host (offloaded) still travel over the mesh's own devices.
        device = local.device if local.device.type == mesh.device_type else torch.device(mesh.device_type)
        send, receive, whole = self._on(device)
        item, own = local.dtype.itemsize, reshuffle.row_elements(me)
        flat = local.contiguous().view(-1).view(torch.uint8)
        for bucket in range(reshuffle.bucket_count):
            sent, end = [], 0
            for member in order:
                rows = reshuffle.in_bucket(member, bucket)
                first, size = rows.start * own * item, len(rows) * own * item
                send[end : end + size].copy_(flat[first : first + size])
                sent.append(size)
                end += size
            count = len(reshuffle.in_bucket(me, bucket))
            received = [count * reshuffle.row_elements(member) * item for member in order]
            incoming = receive[: sum(received)]
            dist.all_to_all_single(incoming, send[:end], received, sent, group=group)
            outcome = whole[: sum(received)].view(local.dtype)
            parts = torch.split(incoming.view(local.dtype), [size // item for size in received])
            _put_together(
                reshuffle, dict(zip(order, parts, strict=True)), outcome.view(count, -1) if count else outcome
            )
            yield outcome

    def _on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        if device not in self._buffers:
            self._buffers[device] = tuple(
                torch.empty(self._size_bytes, dtype=torch.uint8, device=device) for _ in range(3)
            )
        return self._buffers[device]


def _put_together(reshuffle: Reshuffle, parts: Mapping[int, torch.Tensor], rows: torch.Tensor) -> None:
    """Fill whole `rows` with what each member had of them."""
    unit = reshuffle.column_elements
    for member, part in parts.items():
        if not part.numel():
            continue
        columns, position = part.view(len(rows), -1), 0
        for first, count in reshuffle.columns[member]:
            into = rows[:, first * unit : (first + count) * unit]
            into.copy_(columns[:, position * unit : (position + count) * unit])
            position += count


def _bucket_bytes(reshuffle: Reshuffle, dtype: torch.dtype) -> int:
    """The most that a member sends or receives for one bucket."""
    members = range(len(reshuffle.members))
    rows = min(reshuffle.bucket_rows, max(len(reshuffle.owned(member)) for member in members))
    return rows * len(members) * max(reshuffle.row_elements(member) for member in members) * dtype.itemsize
