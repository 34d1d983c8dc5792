"""Saved on any mesh, loaded on any other: the same bits, whatever shapes, dtypes, memory and distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import stillframe
from stillframe.layout.huggingface import plan_huggingface
from stillframe.layout.renaming import KeyMapping
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.copy import Snapshotter
from stillframe.testing.playing import playing

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]


@dataclass(frozen=True)
class Distribution:
    """How each of the tensors lies on a mesh (None: whole on every rank), and whether its memory is transposed."""

    mesh: tuple[int, ...]
    placements: tuple[tuple[Placement, ...] | None, ...]
    transposed: tuple[bool, ...]


@st.composite
def distributions(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> Distribution:
    mesh = draw(st.sampled_from([(1,), (3,), (2, 2), (1, 3)]))
    placements: list[tuple[Placement, ...] | None] = []
    for shape in shapes:
        kinds: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        drawn = tuple(draw(st.sampled_from(kinds)) for _ in mesh)
        if len(mesh) == 2 and isinstance(drawn[1], Shard) and draw(st.booleans()):
            dim = drawn[1].dim  # as fully_shard over tensor parallelism; even, for torch's own cut is wrong elsewhere
            drawn = (_StridedShard(dim, split_factor=mesh[1]), drawn[1]) if shape[dim] % math.prod(mesh) == 0 else drawn
        placements.append(draw(st.sampled_from([None, drawn, drawn, drawn])))
    return Distribution(mesh, tuple(placements), tuple(draw(st.booleans()) for _ in shapes))


@st.composite
def journeys(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[torch.dtype], Distribution, Distribution]:
    sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 12])
    shapes = draw(st.lists(st.lists(sizes, max_size=3).map(tuple), min_size=1, max_size=4))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in shapes]
    return shapes, dtypes, draw(distributions(shapes)), draw(distributions(shapes))


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    numbers = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return numbers % 2 == 0 if dtype == torch.bool else numbers.float().to(dtype)


def module(
    shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], distribution: Distribution, *, seed: int
) -> nn.Module:
    mesh = init_device_mesh("cpu", distribution.mesh)
    made = nn.Module()
    for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        tensor = values(shape, dtype, seed + number)
        placements = distribution.placements[number]
        if placements is not None:
            tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if distribution.transposed[number] and local.dim() >= 2:
            turned = local.transpose(0, 1).contiguous().transpose(0, 1)
            if isinstance(tensor, DTensor):
                tensor._local_tensor = turned
            else:
                tensor = turned
        made.register_parameter(f"t{number}", nn.Parameter(tensor, requires_grad=False))
    return made


def save(directory: Path, *what: object) -> None:
    """Put the files together from the arenas of all ranks, played one after the other."""
    shapes, dtypes, distribution = what
    world_size = math.prod(distribution.mesh)  # type: ignore[attr-defined]
    files: dict[str, bytearray] = {}
    for rank in range(world_size):
        with playing(rank, world_size):
            model = module(shapes, dtypes, distribution, seed=0)  # type: ignore[arg-type]
            plan = plan_huggingface(
                model,
                max_shard_bytes=200,
                rank=rank,
                world_size=world_size,
                plan_id=1,
                key_mapping=KeyMapping(rules=()),
            )
            arena = Arena(plan.share.plan.arena_bytes)
            snapshotter = Snapshotter(plan.tensors, plan.share.copies, plan.share.envelopes, arena)
            snapshotter.lay_envelopes()
            snapshotter.copy()
            memory = arena.bytes.numpy().tobytes()
            arena.close()
        for file in plan.share.plan.files:
            content = files.setdefault(file.name, bytearray(b"?" * file.size_bytes))
            for extent in file.extents:
                begin, end = extent.arena_offset, extent.arena_offset + extent.length_bytes
                content[extent.file_offset : extent.file_offset + extent.length_bytes] = memory[begin:end]
    for name, content in files.items():
        (directory / name).write_bytes(content)
    for inline in plan.layout.inline_files:
        (directory / inline.name).write_bytes(inline.content)


@settings(max_examples=40)
@given(journeys())
def test_what_any_mesh_saved_any_other_loads(
    journey: tuple[list[tuple[int, ...]], list[torch.dtype], Distribution, Distribution],
) -> None:
    shapes, dtypes, saved_on, loaded_on = journey
    world_size = math.prod(loaded_on.mesh)
    with TemporaryDirectory() as folder:
        save(Path(folder), shapes, dtypes, saved_on)
        for rank in range(world_size):
            with playing(rank, world_size):
                model = module(shapes, dtypes, loaded_on, seed=1000)
                expected = module(shapes, dtypes, loaded_on, seed=0)
                stillframe.load_hf(folder, model, key_mapping={})
                for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
                    one, other = (t._local_tensor if isinstance(t, DTensor) else t for t in (found.data, wanted.data))
                    assert one.shape == other.shape
                    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
                    assert torch.equal(*bits), name
