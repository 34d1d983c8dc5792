"""Chunks of any shape, read into any mesh: every rank gets the bits that torch would distribute to it.

torch's fake process group plays one rank at a time, as in `test_placement`.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, distribute_tensor

from stillframe.errors import UnsupportedPlacement
from stillframe.load.distcp import open_distcp
from stillframe.load.filling import Limits
from tests.property.test_placement import distributions, playing
from tests.unit.load.distcp_directories import bits, publish, save_chunks

Box = tuple[tuple[int, ...], tuple[int, ...]]


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that tile a tensor, cut again and again anywhere: no grid."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5)) if math.prod(shape) > 1 else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        if sizes[dim] < 2:
            boxes.append((offsets, sizes))
            continue
        at = draw(st.integers(1, sizes[dim] - 1))
        for low, size in ((0, at), (at, sizes[dim] - at)):
            moved = (*offsets[:dim], offsets[dim] + low, *offsets[dim + 1 :])
            boxes.append((moved, (*sizes[:dim], size, *sizes[dim + 1 :])))
    return boxes


LIMITS = st.builds(
    Limits,
    buffer_bytes=st.sampled_from([16, 40, 5000, 4 << 20]),
    small_bytes=st.sampled_from([0, 16]),
    gap_bytes=st.sampled_from([0, 10_000]),
    long_piece_bytes=st.sampled_from([1, 12, 10_000]),
) | st.just(Limits())


@settings(max_examples=80)
@given(
    drawn=distributions(),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex128]),
    how=st.sampled_from(["published", "stock", "stock transposed"]),
    verify=st.booleans(),
    limits=LIMITS,
)
def test_any_chunks_into_any_mesh(
    drawn: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
    data: st.DataObject,
    dtype: torch.dtype,
    how: str,
    verify: bool,
    limits: Limits,
) -> None:
    shape, mesh_shape, placements = drawn
    size = math.prod(shape)
    whole = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(shape)
    plain = torch.randint(0, 256, (3 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    tensors = {"t": (whole, data.draw(tilings(shape))), "plain": (plain, [((0,), (1,)), ((1,), (2,))])}
    world_size = math.prod(mesh_shape)
    with TemporaryDirectory() as name:
        directory = save_chunks(
            Path(name) / "c", tensors, files=data.draw(st.integers(1, 3)), transposed=how == "stock transposed"
        )
        if how == "published":
            publish(directory)
        with open_distcp(directory) as opened:
            for rank in range(world_size):
                with playing(rank, world_size):
                    mesh = init_device_mesh("cpu", mesh_shape)
                    target = distribute_tensor(torch.zeros_like(whole), mesh, placements, src_data_rank=None)
                    expected = distribute_tensor(whole, mesh, placements, src_data_rank=None)
                    targets = {"t": target, "plain": torch.zeros_like(plain)}
                    try:
                        opened.fill(targets, verify=verify, limits=limits)
                    except UnsupportedPlacement:
                        assert not bits(target._local_tensor).any()
                        continue
                    assert torch.equal(bits(target._local_tensor), bits(expected._local_tensor))
                    assert torch.equal(bits(targets["plain"]), bits(plain))
