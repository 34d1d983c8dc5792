"""The plan of a DCP directory: what the digest tells apart, what is refused, what is written where."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from stillframe.errors import LayoutError, UnsupportedModel, UnsupportedPlacement
from stillframe.layout.distcp import DistcpPlan, plan_distcp
from stillframe.testing.models import tiny_qwen3_moe
from stillframe.testing.playing import playing
from stillframe.tree import StateTree
from tests.state_trees import stepped, tree_of


def tree(tensors: Mapping[str, torch.Tensor], **changed: Any) -> StateTree:
    aliases = changed.pop("aliases", {})
    objects = changed.pop("objects", {"lr": 0.5})
    keys = [*tensors, *aliases, *objects]
    paths = {key: tuple(key.split(".")) for key in keys}
    fields: dict[str, Any] = {"rank_0_only": frozenset(), "paths": paths, **changed}
    return StateTree(tensors=tensors, aliases=aliases, objects=objects, **fields)


def plan(of: StateTree, *, rank: int = 0, world_size: int = 1, **limit: int) -> DistcpPlan:
    return plan_distcp(of, rank=rank, world_size=world_size, plan_id=1, **limit)


def chunk_names(of: DistcpPlan) -> list[str]:
    return [item.name for file in of.layout.files for item in file.items if item.name]


BASE = {"model.a": torch.zeros(4, 2), "model.b": torch.zeros(3)}
CHANGES: dict[str, Callable[[], StateTree]] = {
    "a name": lambda: tree({"model.c": BASE["model.a"], "model.b": BASE["model.b"]}),
    "the order": lambda: tree(dict(reversed(BASE.items()))),
    "a shape": lambda: tree({**BASE, "model.b": torch.zeros(1, 3)}),
    "a dtype": lambda: tree({**BASE, "model.b": torch.zeros(3, dtype=torch.int32)}),
    "an alias": lambda: tree(BASE, aliases={"model.tied": "model.a"}),
    "whose values count": lambda: tree(BASE, rank_0_only=frozenset({"model.b"})),
    "an object's key": lambda: tree(BASE, objects={"momentum": 0.5}),
    "a path": lambda: tree(BASE, paths={"model.a": ("model.a",), "model.b": ("model", "b"), "lr": ("lr",)}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_digest_depends_on(what: str) -> None:
    assert plan(CHANGES[what]()).layout.digest != plan(tree(BASE)).layout.digest


def test_the_digest_depends_on_limit_world_size_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    base = plan(tree(BASE)).layout.digest
    assert plan(tree(BASE), max_file_bytes=7).layout.digest != base
    assert plan(tree(BASE), world_size=2).layout.digest != base
    monkeypatch.setattr(torch, "__version__", "0")
    assert plan(tree(BASE)).layout.digest != base


def test_the_digest_depends_on_placements_and_the_part_of_the_mesh() -> None:
    digests = []
    with playing(0, 4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        for chosen, placements in [
            (mesh["dp"], [Shard(0)]),
            (mesh["tp"], [Shard(0)]),
            (mesh["dp"], [Shard(1)]),
            (mesh["dp"], [Replicate()]),
            (mesh, [Shard(0), Replicate()]),
            (mesh, [Replicate(), Shard(0)]),
        ]:
            tensor = distribute_tensor(torch.zeros(4, 4), chosen, placements, src_data_rank=None)
            digests.append(plan(tree({"t": tensor}), world_size=4).layout.digest)
    assert len(set(digests)) == len(digests)


def test_values_make_no_difference() -> None:
    other = tree({key: tensor + 1 for key, tensor in BASE.items()}, objects={"lr": 0.125})
    assert plan(other).layout == plan(tree(BASE)).layout


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(3, device="meta"), r"model\.bad: has no values yet \(meta device\)"),
        (lambda: torch.eye(3).to_sparse(), r"model\.bad: .* layout torch\.sparse_coo"),
        (
            lambda: torch.empty(4, dtype=torch.int4),
            r"model\.bad: torch\.save cannot save a tensor of dtype torch\.int4",
        ),
    ],
    ids=["meta", "sparse", "int4"],
)
def test_what_cannot_be_stored_is_refused(make: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        plan(tree({**BASE, "model.bad": make()}))


def test_a_local_tensor_of_another_shape_is_refused_by_key() -> None:
    with playing(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        tensor = DTensor.from_local(
            torch.zeros(4, 3), mesh, [Shard(0)], run_check=False, shape=torch.Size((6, 4)), stride=(4, 1)
        )
        with pytest.raises(UnsupportedPlacement, match=r"model\.w: this rank's shard has shape \(4, 3\)"):
            plan(tree({"model.w": tensor}), rank=1, world_size=2)


def test_chunks_are_named_by_their_offsets_and_files_end_at_the_limit() -> None:
    tensors = {"a": torch.zeros(()), "b": torch.zeros(0, 3), "c": torch.zeros(100, 10), "d": torch.zeros(2, 2)}
    planned = plan(tree(tensors), max_file_bytes=5000)
    assert chunk_names(planned) == ["a@", "b@0,0", "c@0,0", "d@0,0"]
    assert [file.name for file in planned.layout.files] == [f"__0_{n}.distcp" for n in range(3)]
    assert [file.size_bytes <= 5000 for file in planned.layout.files] == [True, False, True]
    assert planned.layout.rank_files == ("state/rank-00000.pt",)
    assert planned.layout.held_back == (".metadata",)
    assert planned.metadata is not None
    assert [file.name for file in planned.metadata.render({"lr": 1})] == ["__0_3.distcp", ".metadata"]


def test_what_all_hold_alike_is_cut_where_it_stays_contiguous() -> None:
    planned = plan(tree({"conv": torch.zeros(1, 4000, 3)}), world_size=4)
    assert chunk_names(planned) == ["conv@0,0,0", "conv@0,1000,0", "conv@0,2000,0", "conv@0,3000,0"]
    assert len(planned.share.copies) == 1


def test_a_shard_of_several_pieces_is_several_chunks() -> None:
    """torch's own planner describes it as one chunk, which is wrong."""
    with playing(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        placements = [_StridedShard(0, split_factor=2)]
        tensor = distribute_tensor(torch.arange(8.0), mesh, placements, src_data_rank=None)
        planned = plan(tree({"t": tensor}), rank=1, world_size=2)
    assert chunk_names(planned) == ["t@2", "t@6"]


def test_metadata_is_pickled_again_only_when_an_object_has_another_length() -> None:
    planned = plan(tree(BASE, aliases={"model.tied": "model.a"}))
    assert planned.metadata is not None
    _, first = planned.metadata.render({"lr": 0.5})
    objects, second = planned.metadata.render({"lr": 0.25})
    assert second.content is first.content
    assert torch.load(io.BytesIO(objects.content)) == 0.25
    longer, third = planned.metadata.render({"lr": list(range(1000))})
    described = pickle.loads(third.content)
    info = next(info for index, info in described.storage_data.items() if index.fqn == "lr")
    assert (info.relative_path, info.offset, info.length) == ("__0_1.distcp", 0, len(longer.content))
    places = {index.fqn: info for index, info in described.storage_data.items()}
    assert places["model.tied"] == places["model.a"]
    with pytest.raises(LayoutError, match=r"have changed since it was planned: \['momentum'\] are not \['lr'\]"):
        planned.metadata.render({"momentum": 1})


def test_without_objects_there_is_no_file_of_them() -> None:
    planned = plan(tree(BASE, objects={}))
    assert planned.metadata is not None
    assert [file.name for file in planned.metadata.render({})] == [".metadata"]


@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_ranks_that_hold_a_model_alike_write_fair_shares(world_size: int) -> None:
    model = tiny_qwen3_moe()
    state = tree_of(model, stepped(model))
    sizes = []
    for rank in range(world_size):
        planned = plan(state, rank=rank, world_size=world_size)
        sizes.append(sum(file.size_bytes for file in planned.share.plan.files))
    assert max(sizes) / (sum(sizes) / world_size) <= 1.05
