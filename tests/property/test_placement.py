"""What `holding` says each rank holds, against what torch itself puts there.

torch's fake process group plays one rank at a time, so every rank of every mesh is seen without a single process.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from stillframe.errors import UnsupportedPlacement
from stillframe.layout.placement import Holding, Holdings
from stillframe.testing.playing import playing

MESHES = [(1,), (2,), (3,), (4,), (2, 2), (3, 2), (2, 3), (1, 4), (2, 1, 3), (2, 2, 2)]


def distributed(shape: Sequence[int], mesh_shape: tuple[int, ...], placements: Sequence[Placement]) -> DTensor:
    """This rank's part of a tensor whose elements count from 0."""
    values = torch.arange(math.prod(shape)).reshape(shape)
    return distribute_tensor(values, init_device_mesh("cpu", mesh_shape), placements, src_data_rank=None)


def held(name: str, tensor: torch.Tensor, rank: int, world_size: int) -> Holding:
    return Holdings(rank=rank, world_size=world_size).of(name, tensor, is_parameter=True)


def holdings(
    shape: Sequence[int], mesh_shape: tuple[int, ...], placements: Sequence[Placement]
) -> list[tuple[Holding | None, torch.Tensor]]:
    """Of every rank: what `holding` says, None if it refuses, and the local tensor."""
    results: list[tuple[Holding | None, torch.Tensor]] = []
    world_size = math.prod(mesh_shape)
    for rank in range(world_size):
        with playing(rank, world_size):
            tensor = distributed(shape, mesh_shape, placements)
            try:
                said = held("t", tensor, rank, world_size)
            except UnsupportedPlacement:
                said = None
            results.append((said, tensor._local_tensor))
    return results


def indices(said: Holding, local: torch.Tensor) -> list[int]:
    """The global indices that the runs give to the local elements, in the order of the local tensor."""
    assert said.runs.start.tolist() == sorted(said.runs.start.tolist())
    assert set(said.runs.source.tolist()) <= {0}
    given_to = {}
    for start, local_start, length in zip(
        *(c.tolist() for c in (said.runs.start, said.runs.source_start, said.runs.length)), strict=True
    ):
        assert length > 0
        given_to.update(zip(range(local_start, local_start + length), range(start, start + length), strict=True))
    assert sorted(given_to) == list(range(local.numel())), "each local element once"
    return [given_to[i] for i in range(local.numel())]


@st.composite
def distributions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=3)))
    mesh_shape = draw(st.sampled_from(MESHES))
    placements: list[Placement] = []
    strided_dims: set[int] = set()
    for _ in mesh_shape:
        dim = draw(st.integers(0, len(shape) - 1)) if shape else 0
        kind = draw(st.sampled_from(["replicate", "shard", "shard", "strided"])) if shape else "replicate"
        if kind == "strided" and dim not in strided_dims:
            strided_dims.add(dim)
            placements.append(_StridedShard(dim, split_factor=draw(st.integers(1, 4))))
        else:
            placements.append(Replicate() if kind == "replicate" else Shard(dim))
    return shape, mesh_shape, tuple(placements)


@settings(max_examples=300)
@given(distributions())
def test_holdings_are_what_torch_distributes_and_hold_every_element_once(
    drawn: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    shape, mesh_shape, placements = drawn
    said = holdings(shape, mesh_shape, placements)
    if any(one is None for one, _ in said):
        # Only an uneven _StridedShard before a Shard is refused, and then on every rank.
        assert [one for one, _ in said] == [None] * len(said)
        assert any(isinstance(p, _StridedShard) for p in placements)
        return
    by_replicas: dict[tuple[int, ...], list[int]] = {}
    for rank, (one, local) in enumerate(said):
        assert one is not None
        own = indices(one, local)
        assert own == local.reshape(-1).tolist()
        assert rank in one.replicas
        assert by_replicas.setdefault(one.replicas, own) == own, "replicas hold the same"
    assert len({one.signature for one, _ in said if one is not None}) == 1
    ranks = Counter(rank for replicas in by_replicas for rank in replicas)
    assert ranks == Counter(range(len(said))), "the groups of replicas are disjoint and have all ranks"
    elements = Counter(index for own in by_replicas.values() for index in own)
    assert elements == Counter(range(math.prod(shape)))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    data_parallel=st.integers(1, 4),
    tensor_parallel=st.integers(1, 4),
)
def test_fsdp_over_tensor_parallel_rows_is_what_fully_shard_holds_or_refused_by_all(
    rows: int, data_parallel: int, tensor_parallel: int
) -> None:
    said = _fsdp_over_tp(rows, data_parallel, tensor_parallel)
    refused = [one is None for one, _ in said]
    assert len(set(refused)) == 1, "all ranks refuse, or none"
    assert not (refused[0] and rows % (data_parallel * tensor_parallel) == 0), "even shards are never refused"
    for one, local in said:
        if one is not None:
            assert indices(one, local) == local.reshape(-1).tolist()


@pytest.mark.parametrize(("rows", "data_parallel", "tensor_parallel"), [(7, 3, 2), (27, 3, 4)])
def test_uneven_shards_that_torch_describes_wrongly_are_refused_on_every_rank(
    rows: int, data_parallel: int, tensor_parallel: int
) -> None:
    # 27 rows: on rank (2, 2) the wrong reading has as many rows as the right one, so a count would not notice.
    said = _fsdp_over_tp(rows, data_parallel, tensor_parallel)
    assert [one for one, _ in said] == [None] * (data_parallel * tensor_parallel)


def _fsdp_over_tp(rows: int, data_parallel: int, tensor_parallel: int) -> list[tuple[Holding | None, torch.Tensor]]:
    results: list[tuple[Holding | None, torch.Tensor]] = []
    world_size = data_parallel * tensor_parallel
    for rank in range(world_size):
        with playing(rank, world_size):
            mesh = init_device_mesh("cpu", (data_parallel, tensor_parallel), mesh_dim_names=("dp", "tp"))
            linear = nn.Linear(2, rows, bias=False)
            values = torch.arange(2.0 * rows).reshape(rows, 2)
            linear.weight = nn.Parameter(distribute_tensor(values, mesh["tp"], [Shard(0)], src_data_rank=None))
            fully_shard(linear, mesh=mesh["dp"])
            weight = linear.weight
            assert isinstance(weight, DTensor)
            first = _StridedShard(0, split_factor=tensor_parallel) if tensor_parallel > 1 else Shard(0)
            assert weight.placements == (first, Shard(0))
            try:
                said = held("w", weight, rank, world_size)
            except UnsupportedPlacement:
                said = None
            results.append((said, weight._local_tensor.detach().to(torch.int64)))
    return results


@given(st.integers(1, 12), st.sampled_from([(2, 2), (3, 2)]), st.data())
def test_two_strided_shards_on_one_dimension_are_refused(
    size: int, mesh_shape: tuple[int, int], data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, math.prod(mesh_shape) - 1))
    with playing(rank, math.prod(mesh_shape)):
        placements = [_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=3)]
        tensor = distributed((size, 2), mesh_shape, placements)
        with pytest.raises(UnsupportedPlacement, match=r"layer\.weight: two _StridedShard on dimension 0"):
            held("layer.weight", tensor, rank, math.prod(mesh_shape))


def test_two_strided_shards_on_different_dimensions_are_not_refused() -> None:
    placements = (_StridedShard(0, split_factor=2), _StridedShard(1, split_factor=2))
    said = holdings((8, 8), (2, 2), placements)
    assert all(one is not None and indices(one, local) == local.reshape(-1).tolist() for one, local in said)


def test_a_partial_tensor_is_refused() -> None:
    with playing(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        tensor = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        with pytest.raises(UnsupportedPlacement, match=r"grad: placement P\(sum\) holds no final values"):
            held("grad", tensor, 0, 2)


def test_a_mesh_that_does_not_span_all_ranks_is_refused() -> None:
    with playing(1, 4):
        mesh = DeviceMesh("cpu", [0, 1])
        tensor = distribute_tensor(torch.arange(8), mesh, [Shard(0)], src_data_rank=None)
        with pytest.raises(UnsupportedPlacement, match=r"ranks \[0, 1\] but the job has ranks 0\.\.3"):
            held("norm", tensor, 1, 4)


@pytest.mark.parametrize(
    ("part", "rank", "placements", "elements", "replicas"),
    [
        ("dp", 1, [Shard(0)], (0, 4), (0, 1)),
        ("dp", 2, [Shard(0)], (4, 8), (2, 3)),
        ("tp", 1, [Shard(0)], (4, 8), (1, 3)),
        ("tp", 2, [Shard(0)], (0, 4), (0, 2)),
        ("dp", 3, [Replicate()], (0, 8), (0, 1, 2, 3)),
        ("all", 2, [Shard(0)], (4, 6), (2,)),
    ],
)
def test_what_is_on_a_part_of_the_mesh_is_replicated_over_the_rest(
    part: str, rank: int, placements: list[Placement], elements: tuple[int, int], replicas: tuple[int, ...]
) -> None:
    with playing(rank, 4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        chosen = mesh._flatten("all") if part == "all" else mesh[part]
        tensor = distribute_tensor(torch.arange(8), chosen, placements, src_data_rank=None)
        said = Holdings(rank=rank, world_size=4).of("norm", tensor, is_parameter=True)
    assert said.replicas == replicas
    assert [(int(s), int(s + n)) for s, n in zip(said.runs.start, said.runs.length, strict=True)] == [elements]


def test_a_local_tensor_of_another_shape_than_its_placement_makes_is_refused() -> None:
    with playing(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        tensor = DTensor.from_local(
            torch.zeros(4, 3), mesh, [Shard(0)], run_check=False, shape=torch.Size((6, 4)), stride=(4, 1)
        )
        with pytest.raises(UnsupportedPlacement, match=r"shard has shape \(4, 3\) .* makes it \(3, 4\)"):
            held("w", tensor, 0, 2)


@given(rank=st.integers(0, 3), size=st.integers(0, 5), is_parameter=st.booleans())
def test_a_plain_tensor_is_held_by_all_ranks_and_a_plain_buffer_by_the_first(
    rank: int, size: int, is_parameter: bool
) -> None:
    tensor = torch.arange(size * 2).reshape(size, 2)
    said = Holdings(rank=rank, world_size=4).of("b", tensor, is_parameter=is_parameter)
    assert said.replicas == ((0, 1, 2, 3) if is_parameter else (0,))
    whole = rank in said.replicas
    assert indices(said, tensor if whole else tensor[:0]) == (list(range(size * 2)) if whole else [])


def test_the_order_of_ranks_in_a_mesh_decides_who_holds_what() -> None:
    for rank in range(4):
        with playing(rank, 4):
            mesh = DeviceMesh("cpu", torch.tensor([[3, 1], [0, 2]]))
            tensor = distribute_tensor(torch.arange(10), mesh, [Replicate(), Shard(0)], src_data_rank=None)
            said = held("t", tensor, rank, 4)
            assert indices(said, tensor._local_tensor) == tensor._local_tensor.tolist()
            assert said.replicas == ((0, 3) if rank in (0, 3) else (1, 2))


@settings(max_examples=30)
@given(distributions())
def test_equal_signatures_mean_equal_holdings(
    drawn: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    shape, mesh_shape, placements = drawn
    assume(math.prod(mesh_shape) > 1)
    said = holdings(shape, mesh_shape, placements)
    other = holdings(shape, mesh_shape, [Replicate()] * len(mesh_shape))
    for (one, _), (two, _) in zip(said, other, strict=True):
        if one is not None and two is not None and one.signature == two.signature:
            assert one.replicas == two.replicas
            assert [c.tolist() for c in (one.runs.start, one.runs.length)] == [
                c.tolist() for c in (two.runs.start, two.runs.length)
            ]
