"""Bringing a tensor to one rank: what arrives, and how much memory it takes on either side."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stillframe.errors import StillframeError
from stillframe.records import Gather, Piece
from stillframe.snapshot.gather import Gatherer, in_parts
from stillframe.snapshot.peers import Peers
from stillframe.testing import run_ranks

BUCKET_BYTES = 4096
ROWS, COLUMNS = 96, 80


class Made(TorchDispatchMode):
    """The sizes of all new memory that operations ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if re.search("empty|clone|cat|_to_copy|zeros|stack", str(func)):
            self.bytes.append(result.nbytes)
        return result


def _gather(dim: int) -> tuple[list[int], torch.Tensor | None]:
    """Halves of a matrix along `dim`: rank 0 has one and owns it, rank 1 has the other."""
    rank = dist.get_rank()
    values = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    half = values.chunk(2, dim)[rank].contiguous()
    sizes = tuple(half.shape)
    pieces = [
        Piece(
            tensor="w",
            sender=sender,
            offsets=tuple(size * sender if d == dim else 0 for d, size in enumerate(sizes)),
            sizes=sizes,
            local_offsets=(0, 0),
        )
        for sender in (0, 1)
    ]
    own = pieces if rank == 0 else pieces[1:]
    gather = Gather(owner=0, pieces=tuple(own), tensors=("w",) if rank == 0 else ())
    peers = Peers(30.0)
    peers.meet(0, "tensors")
    # The owner knows the whole shape from its tensor, which elsewhere is a DTensor; its own part is the first.
    tensor = torch.empty(ROWS, COLUMNS)
    tensor[: sizes[0], : sizes[1]] = half
    gatherer = Gatherer([gather], {"w": tensor}, None, peers, bucket_bytes=BUCKET_BYTES)
    arrived = None
    with Made() as made:
        for values_by_name in gatherer.arrivals():
            arrived = values_by_name["w"]
    peers.close()
    return made.bytes, arrived


@pytest.mark.parametrize("dim", [0, 1])
def test_a_gather_takes_a_bucket_on_the_sender_and_the_tensor_and_a_bucket_on_the_owner(dim: int) -> None:
    (owner, arrived), (sender, nothing) = run_ranks(2, _gather, dim)
    assert arrived is not None
    assert nothing is None
    assert torch.equal(arrived, torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS))
    assert arrived.nbytes > 4 * BUCKET_BYTES
    assert max(sender, default=0) <= BUCKET_BYTES
    assert sorted(owner)[-1] == arrived.nbytes
    assert max(sorted(owner)[:-1], default=0) <= BUCKET_BYTES
    # Rows need no bucket at all: they are sent from where they are, and arrive where they belong.
    assert (len(sender) > 0) == (len(owner) > 1) == (dim == 1)


@given(st.lists(st.integers(0, 7), min_size=0, max_size=4), st.integers(1, 300))
def test_parts_tile_a_tensor_in_order_and_none_is_too_large(shape: list[int], most_bytes: int) -> None:
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int64).reshape(shape)
    parts = list(in_parts(tensor, most_bytes))
    assert [value for part in parts for value in part.reshape(-1).tolist()] == tensor.reshape(-1).tolist()
    assert all(part.nbytes <= max(most_bytes, 8) for part in parts)


def _wait() -> str | None:
    """Rank 0 waits for what rank 1 never sends."""
    peers = Peers(3.0)
    peers.meet(0, "tensors")
    reason = None
    if dist.get_rank() == 0:
        with pytest.raises(StillframeError) as late:
            peers.receive(torch.empty(4), 1)
        with pytest.raises(StillframeError, match="failed before"):
            peers.receive(torch.empty(4), 1)
        reason = str(late.value)
    dist.barrier()
    peers.close()
    return reason


def test_who_waits_for_what_is_never_sent_gives_up_and_says_for_whom() -> None:
    reason, _ = run_ranks(2, _wait)
    assert reason is not None
    assert reason.startswith("this rank could not get tensors from rank 1 within 3 s")
