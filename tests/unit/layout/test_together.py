"""An export and a checkpoint staged together write what they write apart, from fewer bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from stillframe.layout.casting import Cast
from stillframe.layout.distcp import DistcpPlan, plan_distcp
from stillframe.layout.huggingface import HuggingFacePlan, plan_huggingface
from stillframe.layout.together import as_one, plan_together, share_as_one
from stillframe.records import Blocks, Copy, Envelope, RankShare, WritePlan
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.copy import Snapshotter
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe
from stillframe.testing.playing import playing
from tests.state_trees import stepped, tree_of


@dataclass(frozen=True)
class Case:
    """`world_size` ranks with one model; parameters with `frozen` in their name are left out of the checkpoint."""

    world_size: int
    sharded: bool
    moe: bool = False
    cast: Cast | None = None
    frozen: str | None = None

    def model(self) -> PreTrainedModel:
        model = tiny_qwen3_moe() if self.moe else tiny_qwen3(tied=True)
        for name, parameter in model.named_parameters():
            if self.frozen is not None and self.frozen in name:
                parameter.requires_grad_(False)
        if self.sharded:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        return model


BFLOAT16 = Cast(dtype=torch.bfloat16, keep=())
FP8 = Cast(dtype=torch.bfloat16, keep=(), fp8_but=())
CASES = {
    "fsdp": Case(3, sharded=True, moe=True),
    "fsdp, tied": Case(2, sharded=True),
    "alike": Case(3, sharded=False, moe=True),
    "cast": Case(2, sharded=True, cast=BFLOAT16),
    "cast, alike": Case(2, sharded=False, cast=BFLOAT16),
    "fp8": Case(1, sharded=True, moe=True, cast=FP8),
    "fp8, alike": Case(3, sharded=False, moe=True, cast=FP8),
    "frozen left out": Case(2, sharded=False, frozen="mlp"),
    "frozen left out, fsdp": Case(3, sharded=True, frozen="mlp"),
}


@dataclass
class Written:
    """Files that ranks wrote, and what each staged for them."""

    files: dict[str, bytearray] = field(default_factory=dict)
    staged_bytes: list[int] = field(default_factory=list)

    def write(
        self,
        share: RankShare,
        tensors: Mapping[str, torch.Tensor],
        *more: WritePlan,
        blocks: Blocks | None = None,
    ) -> None:
        arena = Arena(share.plan.arena_bytes)
        snapshotter = Snapshotter(tensors, share.copies, share.envelopes, arena, blocks=blocks)
        snapshotter.lay_envelopes()
        snapshotter.copy()
        for plan in (share.plan, *more):
            for file in plan.files:
                content = self.files.setdefault(file.name, bytearray(file.size_bytes))
                for extent in file.extents:
                    staged = arena.bytes[extent.arena_offset :][: extent.length_bytes].numpy().tobytes()
                    assert len(staged) == extent.length_bytes
                    content[extent.file_offset : extent.file_offset + extent.length_bytes] = staged
        arena.close()
        self.staged_bytes.append(snapshotter.staged_bytes)


@dataclass
class Runs:
    """A case on all ranks: its files written apart and together, as two and as one."""

    hf: Written = field(default_factory=Written)
    checkpoint: Written = field(default_factory=Written)
    joint: Written = field(default_factory=Written)
    one: Written = field(default_factory=Written)
    hf_only_bytes: int = 0
    layouts: list[tuple[Any, Any, Any]] = field(default_factory=list)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Case, Runs]:
    return CASES[request.param], run(CASES[request.param])


def run(case: Case) -> Runs:
    runs = Runs()
    for rank in range(case.world_size):
        with playing(rank, case.world_size):
            model = case.model()
            tree = tree_of(model, stepped(model), frozen=case.frozen is None)
            place: dict[str, Any] = {"rank": rank, "world_size": case.world_size}
            hf = plan_huggingface(model, max_shard_bytes=100_000, cast=case.cast, plan_id=3, **place)
            checkpoint = plan_distcp(tree, plan_id=5, max_file_bytes=300_000, **place)
            joint = plan_together(hf, checkpoint)
            runs.hf.write(hf.share, hf.tensors, blocks=hf.blocks)
            runs.checkpoint.write(checkpoint.share, checkpoint.tensors)
            assert (joint.hf.plan_id, joint.checkpoint.plan_id) == (3, 5)
            assert joint.hf.arena_bytes == joint.checkpoint.arena_bytes
            runs.joint.write(
                RankShare(plan=joint.hf, copies=joint.copies, envelopes=joint.envelopes),
                joint.tensors,
                joint.checkpoint,
                blocks=joint.blocks,
            )
            layout = as_one(hf.layout, checkpoint.layout)
            one = share_as_one(joint, layout, plan_id=9)
            assert (one.plan.plan_id, one.plan.layout_digest) == (9, layout.digest)
            runs.one.write(one, joint.tensors, blocks=joint.blocks)
            runs.layouts.append((hf.layout, checkpoint.layout, layout))
            assert_disjoint(one, joint.tensors)
            if rank == 0:
                runs.hf_only_bytes = only_in_export(hf, checkpoint)
    return runs


def only_in_export(hf: HuggingFacePlan, checkpoint: DistcpPlan) -> int:
    """Bytes of the export that are in no checkpoint: headers, keys that are cast, keys of tensors that are left out."""
    kept = {id(tensor) for tensor in checkpoint.tensors.values()}
    count = 0
    for item in hf.items:
        if item.runs is None or item.cast_to is not None:
            count += item.length_bytes
        else:
            for source, length in zip(item.runs.source.tolist(), item.runs.length.tolist(), strict=True):
                if id(hf.tensors[hf.sources[source]]) not in kept:
                    count += length * item.element_bytes
    return count


def assert_disjoint(share: RankShare, tensors: Mapping[str, torch.Tensor]) -> None:
    def size(origin: Copy | Envelope) -> int:
        if isinstance(origin, Envelope):
            return len(origin.content)
        dtype = tensors[origin.tensor].dtype if origin.dtype is None else getattr(torch, origin.dtype)
        return origin.element_count * dtype.itemsize

    end = 0
    for origin in sorted((*share.copies, *share.envelopes), key=lambda o: o.arena_offset):
        assert origin.arena_offset >= end
        end = origin.arena_offset + size(origin)
    assert end <= share.plan.arena_bytes


def test_together_both_are_what_they_are_apart(case: tuple[Case, Runs]) -> None:
    _, runs = case
    assert runs.joint.files == {**runs.hf.files, **runs.checkpoint.files}
    prefixed = {f"hf/{name}": content for name, content in runs.hf.files.items()}
    prefixed |= {f"checkpoint/{name}": content for name, content in runs.checkpoint.files.items()}
    assert runs.one.files == prefixed
    assert len(runs.hf.files) >= 2
    assert len(runs.checkpoint.files) > 2


def test_what_both_need_is_staged_once(case: tuple[Case, Runs]) -> None:
    described, runs = case
    assert sum(runs.joint.staged_bytes) == sum(runs.checkpoint.staged_bytes) + runs.hf_only_bytes
    assert runs.one.staged_bytes == runs.joint.staged_bytes
    exported = sum(map(len, runs.hf.files.values()))
    assert (runs.hf_only_bytes == exported) == (described.cast is not None)
    if described.cast is None:
        assert runs.hf_only_bytes < exported / (1.5 if described.frozen else 10)


def test_no_rank_stages_for_others_what_they_hold_alike(case: tuple[Case, Runs]) -> None:
    described, runs = case
    if not described.sharded:
        mean = sum(runs.one.staged_bytes) / described.world_size
        assert max(runs.one.staged_bytes) / mean <= 1.1


def test_one_layout_has_both(case: tuple[Case, Runs]) -> None:
    _, runs = case
    for hf, checkpoint, one in runs.layouts:
        assert one.format == "step"
        assert one.total_bytes == hf.total_bytes + checkpoint.total_bytes
        assert one.held_back == ("hf/config.json", "checkpoint/.metadata")
        assert one.rank_files == tuple(f"checkpoint/{name}" for name in checkpoint.rank_files)
        assert [f.name for f in one.inline_files] == ["hf/model.safetensors.index.json"]
        assert {f.name for f in one.files} == {f"hf/{f.name}" for f in hf.files} | {
            f"checkpoint/{f.name}" for f in checkpoint.files
        }
    first = runs.layouts[0]
    assert len({one.digest for _, _, one in runs.layouts}) == 1
    assert as_one(replace(first[0], digest="other"), first[1]).digest != first[2].digest
    assert as_one(first[0], replace(first[1], digest="other")).digest != first[2].digest
