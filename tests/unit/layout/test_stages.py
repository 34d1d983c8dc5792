"""The whole model from what the ranks of a pipeline say: the order of its names, and who holds what."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from stillframe.errors import CoverageError, LayoutError
from stillframe.layout.stages import Distribution, Stages, encode, merged


def text(*, distribution: Distribution | None = None, rows: int = 4, name: str = "w") -> str:
    twin = torch.empty(rows, 2, device="meta")
    return encode("Model", {name: (twin, True, distribution)}, {})


def on_mesh(first: list[int], whole: list[list[int]], *placements: object) -> Distribution:
    return Distribution(
        placements=placements,  # type: ignore[arg-type]
        whole=torch.tensor(whole).numpy(),
        ranks=torch.tensor(first).numpy(),
    )


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (["e l.0 l.1", "l.2 n h"], "e l.0 l.1 l.2 n h"),
        (["wte wpe h.0", "h.1 ln head"], "wte wpe h.0 h.1 ln head"),  # names alone would put h.1 first
        (["e l.0 l.10 l.11 n h", "l.2 l.9"], "e l.0 l.2 l.9 l.10 l.11 n h"),  # two stages on one rank
        (["l.2 n h", "e l.0 l.1"], "l.2 n h e l.0 l.1"),  # nothing tells where e belongs but the earlier part
        (["e l.0 h", "e l.1 n h"], "e l.0 l.1 n h"),  # what both have keeps its place in both
        (["a b", "b a"], "a b"),
        (["", "a"], "a"),
    ],
)
def test_names_are_merged_in_the_order_of_the_whole(parts: list[str], whole: str) -> None:
    assert merged([part.split() for part in parts]) == whole.split()


def test_a_tensor_is_held_by_the_ranks_that_say_so() -> None:
    mesh = [[0, 1], [2, 3]]
    stages = Stages([text(name="a"), text(distribution=on_mesh([0, 1], mesh, Shard(0)))], [(0, 1), (2, 3)])
    assert list(stages) == ["a", "w"]
    assert (stages["a"].holders, stages["w"].holders) == ((0, 1), (2, 3))
    assert stages.completed({"a": torch.ones(4, 2)})["w"].device.type == "meta"


def test_placements_survive_the_text() -> None:
    placements = (Replicate(), _StridedShard(0, split_factor=2), Shard(1))
    told = on_mesh([[[0, 1], [2, 3]]], [[[0, 1], [2, 3]]], *placements)  # type: ignore[list-item]
    found = Stages([text(distribution=told)], [(0, 1, 2, 3)])["w"].distribution
    assert found is not None
    assert found.placements == placements
    assert found.ranks.tolist() == [[[0, 1], [2, 3]]]


def test_copies_on_another_mesh_are_left_out() -> None:
    one, other = on_mesh([0, 1], [[0, 1]], Shard(0)), on_mesh([2, 3], [[2, 3]], Shard(0))
    assert Stages([text(distribution=one), text(distribution=other)], [(0, 1), (2, 3)])["w"].holders == (0, 1)


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"w: is \(4, 2\) float32 on rank 0 and \(5, 2\) float32 on rank 3"):
        Stages([text(), text(rows=5)], [(0, 1, 2), (3,)])
    with pytest.raises(CoverageError, match=r"w: no rank holds its shard \(1,\) of .*Shard"):
        Stages([text(distribution=on_mesh([0, 1], [[0, 1], [2, 3]], Shard(0))), text(name="a")], [(0, 2), (1, 3)])
