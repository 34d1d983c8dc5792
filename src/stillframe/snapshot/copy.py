"""Copying this rank's own bytes of its tensors into the arena."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from stillframe.records import Blocks, Copy, Envelope, Gather, QuantizedCopy, Reshuffle, ScalesCopy
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.gather import Compute, Gatherer
from stillframe.snapshot.peers import Peers
from stillframe.snapshot.quantize import Quantizer
from stillframe.snapshot.reshuffle import RowExchange


class Snapshotter:
    """Takes snapshots of one set of tensors into one arena; made once per layout, then only copies.

    `tensors` are the model's own objects (parameters, buffers), by the names that `copies` use. Their memory is looked
    up in each copy: it may move (`model.to`, an optimizer that swaps `.data`), and must not be kept from being freed.
    `blocks`, and where any are shared `peers`, are for copies that are quantized; `gathers`, `compute` and `peers` for
    copies of what other ranks hold, too, or a conversion makes. `meets`: whether any rank exchanges anything.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        copies: Sequence[Copy],
        envelopes: Sequence[Envelope],
        arena: Arena,
        *,
        reshuffles: Sequence[Reshuffle] = (),
        blocks: Blocks | None = None,
        peers: Peers | None = None,
        gathers: Sequence[Gather] = (),
        compute: Compute | None = None,
        bucket_bytes: int = 0,
        meets: bool = False,
    ) -> None:
        self._arena = arena
        self._quantizer = None if blocks is None else Quantizer(copies, blocks, arena, peers)
        copies = [copy for copy in copies if not isinstance(copy, QuantizedCopy | ScalesCopy)]
        gathered = {name for gather in gathers for name in (*gather.tensors, *gather.computed)}
        self._gathered = _by_tensor(copy for copy in copies if copy.tensor in gathered)
        copies = [copy for copy in copies if copy.tensor not in gathered]
        self._copies = [copy for copy in copies if copy.dims is None]
        self._turned = [copy for copy in copies if copy.dims is not None]
        self._reshuffles = reshuffles
        used = {copy.tensor for copy in copies} | {reshuffle.tensor for reshuffle in reshuffles}
        if self._quantizer is not None:
            used |= self._quantizer.tensors
        self._tensors = {name: tensor for name, tensor in tensors.items() if name in used}
        self._targets = [_target(arena, copy, self._tensors[copy.tensor].dtype) for copy in self._copies]
        self._turned_targets = [_target(arena, copy, self._tensors[copy.tensor].dtype) for copy in self._turned]
        self._arriving_targets = [
            [[_target(arena, copy, self._tensors[copy.tensor].dtype) for copy in bucket] for bucket in reshuffle.copies]
            for reshuffle in reshuffles
        ]
        self._envelopes = envelopes
        self._meets = meets
        self._peers = peers
        exchanged = gathered | {piece.tensor for gather in gathers for piece in gather.pieces}
        self._exchanged = {name: tensor for name, tensor in tensors.items() if name in exchanged}
        self._gatherer = Gatherer(gathers, self._exchanged, compute, peers, bucket_bytes=bucket_bytes)
        targets = (
            *self._targets,
            *self._turned_targets,
            *(target for buckets in self._arriving_targets for bucket in buckets for target in bucket),
            *(
                _target(arena, copy, self._exchanged[n].dtype)
                for n, copies in self._gathered.items()
                for copy in copies
            ),
        )
        self.staged_bytes = sum(t.nbytes for t in targets) + sum(len(e.content) for e in envelopes)
        self.staged_bytes += self._quantizer.staged_bytes if self._quantizer is not None else 0

    def lay_envelopes(self) -> None:
        """Put the bytes that are known from the layout into the arena; once, until somebody else has used it."""
        for envelope in self._envelopes:
            content = torch.frombuffer(bytearray(envelope.content), dtype=torch.uint8)
            self._arena.bytes[envelope.arena_offset : envelope.arena_offset + len(content)].copy_(content)

    @torch.no_grad()
    def copy(self) -> None:
        """Copy this rank's share of the tensors into the arena; when it returns, the tensors may change again.

        Blocks for the copy; where blocks of fp8 are shared, or tensors reshuffled or gathered, until all ranks take
        theirs, and raises where one does not come. Ordered after all work queued on the current stream of the tensors'
        device. The process groups that reshuffled tensors are sharded over must be free.
        """
        straight = {copy.tensor for copy in self._copies}
        if self._quantizer is not None:
            straight |= self._quantizer.tensors
        flat = _Flat({n: local_of(t).detach() for n, t in self._tensors.items() if n in straight})
        self._copy_straight(flat)
        if self._quantizer is not None:
            self._quantizer.copy(flat)
        for copy, target in zip(self._turned, self._turned_targets, strict=True):
            assert copy.dims is not None, "what is turned has an order of dimensions"
            self._copy_turned(copy, local_of(self._tensors[copy.tensor]).detach().permute(copy.dims), target)
        if self._meets and self._peers is not None and not self._peers.was_met:
            # Last of all that may fail here alone, for whoever is absent must say so before others wait for its part.
            self._peers.meet(0, "tensors")
        self._copy_reshuffled()
        self._copy_gathered()

    def _copy_straight(self, flat: _Flat) -> None:
        targets, copies = self._targets, self._copies
        if flat.strided:
            pairs = list(zip(copies, targets, strict=True))
            strided = [pair for pair in pairs if pair[0].tensor in flat.strided]
            for copy, target in sorted(strided, key=lambda pair: pair[0].tensor):
                target.copy_(_origin(flat[copy.tensor], copy))
            rest = [pair for pair in pairs if pair[0].tensor not in flat.strided]
            copies, targets = [copy for copy, _ in rest], [target for _, target in rest]
        if targets:
            torch._foreach_copy_(targets, [_origin(flat[copy.tensor], copy) for copy in copies])

    def _copy_reshuffled(self) -> None:
        exchange = RowExchange(self._reshuffles, self._tensors)
        for reshuffle, targets_of in zip(self._reshuffles, self._arriving_targets, strict=True):
            buckets = exchange.buckets(reshuffle, self._tensors[reshuffle.tensor])
            for rows, copies, targets in zip(buckets, reshuffle.copies, targets_of, strict=True):
                if targets:  # none where another replica stages them
                    torch._foreach_copy_(targets, [_origin(rows, copy) for copy in copies])

    def _copy_gathered(self) -> None:
        for values in self._gatherer.arrivals():
            for name, value in values.items():
                for copy in self._gathered.get(name, ()):
                    target = _target(self._arena, copy, value.dtype)
                    if copy.dims is not None:
                        self._copy_turned(copy, value.permute(copy.dims), target)
                    else:
                        target.copy_(_origin(value.reshape(-1), copy))

    def _copy_turned(self, copy: Copy, view: torch.Tensor, target: torch.Tensor) -> None:
        """Matrix by matrix: torch transposes one in blocks, on the CPU, and on an accelerator makes a copy of it there
        before it crosses over, which then is one of a single matrix."""
        place = 0
        target = target if copy.dtype is not None else target.view(view.dtype)
        for matrix in in_matrices(view, copy.first_element, copy.element_count):
            target[place : place + matrix.numel()].view(matrix.shape).copy_(matrix)
            place += matrix.numel()


class _Flat(Mapping[str, torch.Tensor]):
    """Local tensors as flat arrays. Of those in `strided`, whose memory is not in row-major order, the array is a copy;
    only the last one that was asked for is kept."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._views = {name: tensor.view(-1) for name, tensor in tensors.items() if tensor.is_contiguous()}
        self.strided = tensors.keys() - self._views.keys()
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._views:
            return self._views[name]
        if self._last is None or self._last[0] != name:
            self._last = None  # gone before the next one comes
            self._last = (name, self._tensors[name].contiguous().view(-1))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _by_tensor(copies: Iterable[Copy]) -> dict[str, list[Copy]]:
    grouped: dict[str, list[Copy]] = defaultdict(list)
    for copy in copies:
        grouped[copy.tensor].append(copy)
    return grouped


def _target(arena: Arena, copy: Copy, dtype: torch.dtype) -> torch.Tensor:
    """Where in the arena the elements go, as bytes, or in the dtype that they become."""
    becomes = dtype if copy.dtype is None else getattr(torch, copy.dtype)
    target = arena.bytes[copy.arena_offset : copy.arena_offset + copy.element_count * becomes.itemsize]
    return target if copy.dtype is None else target.view(becomes)


def _origin(flat: torch.Tensor, copy: Copy) -> torch.Tensor:
    origin = flat[copy.first_element : copy.first_element + copy.element_count]
    return origin.view(torch.uint8) if copy.dtype is None else origin


def in_matrices(view: torch.Tensor, first: int, count: int) -> Iterator[torch.Tensor]:
    """`count` elements of `view`, in its row-major order from `first` on, as views of at most two dimensions."""
    if not count:
        return
    if view.dim() == 1:
        yield view[first : first + count]
        return
    row = view[0].numel()
    index, into = divmod(first, row)
    if into or count < row:
        here = min(count, row - into)
        yield from in_matrices(view[index], into, here)
        yield from in_matrices(view, first + here, count - here)
        return
    whole = count // row
    if view.dim() == 2:
        yield view[index : index + whole]
    else:
        for slice_ in view[index : index + whole]:
            yield from in_matrices(slice_, 0, row)
    yield from in_matrices(view, first + whole * row, count - whole * row)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of `tensor` on this rank. (`DTensor.to_local` does the same through autograd, 30 times slower.)"""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class Watched:
    """Tells, in about a microsecond per tensor, whether a model still consists of what it was planned with."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = [(t, local_of(t).shape, t.dtype) for t in tensors.values()]
        self._reshards = [m.reshard for m in model.modules() if isinstance(m, FSDPModule)]
        self._tables: list[Mapping[str, object]] = []
        for module in model.modules():
            self._tables += (module._parameters, module._buffers, module._modules)
        self._members = [list(table.values()) for table in self._tables]  # kept alive, so that ids are not reused
        self._ids = [[*map(id, members)] for members in self._members]

    def reshard(self) -> None:
        """Put FSDP parameters back into their sharded state, as `state_dict()` would: a forward without a backward
        (evaluation) leaves them gathered."""
        for reshard in self._reshards:
            reshard()

    def unchanged(self) -> bool:
        """Whether the modules hold the same submodules, parameters and buffers, of the same shapes and dtypes."""
        return all(
            [*map(id, table.values())] == ids for table, ids in zip(self._tables, self._ids, strict=True)
        ) and all(local_of(tensor).shape == shape and tensor.dtype == dtype for tensor, shape, dtype in self._tensors)
