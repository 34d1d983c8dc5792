"""Whatever is sharded how: what ranks send an owner tiles the tensor, in the order in which the owner expects it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from stillframe.layout.gather import GatherPlan, plan_gathers
from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.placement import Holdings
from stillframe.layout.runs import Runs
from stillframe.testing.playing import playing

MESHES = [(1,), (2,), (3,), (2, 2), (3, 2), (2, 2, 2)]
NAMES = ("a", "b", "plain", "buffer")


@st.composite
def distributions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], list[Placement]]]]:
    """A mesh, and for two tensors a shape and placements."""
    mesh_shape = draw(st.sampled_from(MESHES))
    tensors = []
    for _ in range(2):
        shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=3)))
        placements: list[Placement] = [
            draw(st.sampled_from([Replicate(), *map(Shard, range(len(shape)))])) for _ in mesh_shape
        ]
        tensors.append((shape, placements))
    return mesh_shape, tensors


def _key_map(shapes: list[tuple[int, ...]], computed: bool) -> KeyMap:
    """A key for each tensor; of the first two one that is computed of both instead, if so."""
    keys = [
        Key(
            name=name,
            dtype=torch.int64,
            shape=shape,
            runs=Runs.of([(0, index, 0, math.prod(shape))] if math.prod(shape) else []),
            block=index,
            block_bytes=8 * math.prod(shape),
        )
        for index, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    ]
    if computed:
        runs = Runs.of([(0, len(NAMES), 0, 6)])
        keys[:2] = [replace(keys[0], name="c", shape=(6,), runs=runs, made_of=(0, 1))]
    return KeyMap(sources=(*NAMES, *(["computed c"] if computed else [])), keys=tuple(keys))


@settings(max_examples=100)
@given(distributions(), st.booleans(), st.booleans())
def test_what_is_sent_is_what_the_owner_expects_and_is_the_whole_tensor(
    drawn: tuple[tuple[int, ...], list[tuple[tuple[int, ...], list[Placement]]]], computed: bool, every_key: bool
) -> None:
    mesh_shape, tensors_drawn = drawn
    world_size = math.prod(mesh_shape)
    plans: list[GatherPlan] = []
    locals_: list[dict[str, torch.Tensor]] = []
    whole: dict[str, torch.Tensor] = {}
    for rank in range(world_size):
        with playing(rank, world_size):
            mesh = init_device_mesh("cpu", mesh_shape)
            tensors: dict[str, torch.Tensor] = {}
            for name, (shape, placements) in zip(NAMES, tensors_drawn, strict=False):
                whole[name] = torch.arange(math.prod(shape)).reshape(shape)
                tensors[name] = distribute_tensor(whole[name], mesh, placements, src_data_rank=None)
            for name in NAMES[2:]:
                whole[name] = tensors[name] = torch.arange(12).reshape(3, 4)
            held = Holdings(rank=rank, world_size=world_size)
            holdings = {n: held.of(n, t, is_parameter=n != "buffer") for n, t in tensors.items()}
            key_map = _key_map([tuple(whole[name].shape) for name in NAMES], computed)
            plans.append(
                plan_gathers(
                    key_map,
                    tensors,
                    held,
                    holdings,
                    rank=rank,
                    world_size=world_size,
                    buffers=frozenset({"buffer"}),
                    every_key=every_key,
                )
            )
            locals_.append({n: getattr(t, "_local_tensor", t) for n, t in tensors.items()})
    assert len({(plan.summary, plan.exchanges, plan.owned, tuple(plan.owner_of.items())) for plan in plans}) == 1
    signatures = {tuple((name, holding.signature) for name, holding in plan.holdings.items()) for plan in plans}
    assert len(signatures) == 1
    sent = {
        (rank, gather.owner): [piece for g in plan.gathers if g.owner == gather.owner for piece in g.pieces]
        for rank, plan in enumerate(plans)
        for gather in plan.gathers
        if gather.owner != rank
    }
    expected: dict[tuple[int, int], list[object]] = {}
    for owner, plan in enumerate(plans):
        for gather in plan.gathers:
            if gather.owner != owner:
                continue
            arrived = {piece.tensor: torch.full_like(whole[piece.tensor], -1) for piece in gather.pieces}
            for piece in gather.pieces:
                if piece.sender != owner:
                    expected.setdefault((piece.sender, owner), []).append(piece)
                there = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
                here = tuple(slice(o, o + n) for o, n in zip(piece.local_offsets, piece.sizes, strict=True))
                assert (arrived[piece.tensor][there] == -1).all(), "nothing comes twice"
                arrived[piece.tensor][there] = locals_[piece.sender][piece.tensor][here]
            for name, values in arrived.items():
                assert torch.equal(values, whole[name])
            for name in gather.tensors:
                assert name in arrived or not whole[name].numel() or locals_[owner][name].shape == whole[name].shape
    assert sent == expected
    # Of what has an owner, it alone holds anything, and all.
    for name in plans[0].owned:
        sizes = [int(plan.holdings[name].runs.length.sum()) for plan in plans]
        assert sum(size > 0 for size in sizes) <= 1
        assert sum(sizes) == plans[0].tensors[name].numel()
    keys_owned = 4 - computed if every_key else int(computed)
    assert len(plans[0].owner_of) == keys_owned
