"""Where a rank stands in a mesh, where the mesh stands in the job, and which ranks hold the same."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate

from stillframe.errors import UnsupportedPlacement


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeshPart:
    """A mesh, of `ranks`, and its place in the one that it is a part of, of the ranks `whole`.

    `first`: of the meshes that are this one for other ranks, the ranks of the first along the dimensions of `whole`
    that it does not have. `identity` says the same on all ranks: which ranks the mesh (and its likes) puts where.
    """

    ranks: npt.NDArray[np.int64]
    whole: npt.NDArray[np.int64]
    whole_coordinate_of: npt.NDArray[np.int64]
    is_dim_of_part: tuple[bool, ...]
    first: npt.NDArray[np.int64]
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeshPlace:
    """This rank's place in a mesh; `mesh` is kept so that its id is."""

    mesh: DeviceMesh
    part: MeshPart
    coordinate: tuple[int, ...]


def place_in_mesh(name: str, mesh: DeviceMesh, everyone: tuple[int, ...] | None) -> MeshPlace:
    """This rank's place in `mesh`, over which the tensor `name` is distributed, in a job of the ranks `everyone`.

    Raises UnsupportedPlacement unless `mesh` is one that spans the job, or a part of such a mesh; `everyone` None: of
    any mesh.
    """
    whole = np.asarray(mesh._get_root_mesh().mesh.numpy(), dtype=np.int64)
    flat = whole.reshape(-1)
    if everyone is not None and not np.array_equal(np.sort(flat), np.arange(len(everyone))):
        raise UnsupportedPlacement(
            f"{name}: its mesh {mesh} belongs to one of ranks {sorted(flat.tolist())} but the job has ranks "
            f"0..{len(everyone) - 1}; a tensor must be distributed over a mesh that spans all ranks of the job, or "
            "over a part of such a mesh"
        )
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank that holds a part of a tensor is in its mesh"
    part = part_of(name, whole, np.asarray(mesh.mesh.numpy(), dtype=np.int64))
    return MeshPlace(mesh=mesh, part=part, coordinate=tuple(coordinate))


def part_of(name: str, whole: npt.NDArray[np.int64], ranks: npt.NDArray[np.int64]) -> MeshPart:
    """The mesh of `ranks`, over which the tensor `name` is distributed, as a part of that of `whole`.

    Raises UnsupportedPlacement where it is no regular part.
    """
    flat = whole.reshape(-1)
    coordinate_of = np.zeros((int(flat.max()) + 1, whole.ndim), dtype=np.int64)
    coordinate_of[flat] = np.stack(np.unravel_index(np.arange(flat.size), whole.shape), axis=-1)
    extents = [len(np.unique(column)) for column in coordinate_of[ranks.reshape(-1)].T]
    if math.prod(extents) != ranks.size:
        raise UnsupportedPlacement(f"{name}: its mesh {ranks.tolist()} is no regular part of {whole.tolist()}")
    is_dim_of_part = tuple(extent > 1 for extent in extents)
    first = whole[tuple((coordinate_of[ranks] * is_dim_of_part).reshape(-1, whole.ndim).T)]
    return MeshPart(
        ranks=ranks,
        whole=whole,
        whole_coordinate_of=coordinate_of,
        is_dim_of_part=is_dim_of_part,
        first=first.reshape(ranks.shape),
        identity=hashlib.sha256(repr((whole.tolist(), first.tolist())).encode()).hexdigest(),
    )


def coordinates_of(part: MeshPart, ranks: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Where `ranks`, each in the mesh or in one that is this one for it, stand there: a row of coordinates for each."""
    likes = part.whole[tuple((part.whole_coordinate_of[list(ranks)] * part.is_dim_of_part).T)]
    order = np.argsort(part.first.reshape(-1))
    place = order[np.searchsorted(part.first.reshape(-1), likes, sorter=order)]
    return np.stack(np.unravel_index(place, part.first.shape), axis=-1)


def replicas_at(
    placements: tuple[Placement, ...], part: MeshPart, coordinate: tuple[int, ...], holders: tuple[int, ...] | None
) -> tuple[int, ...]:
    """All ranks that hold what the one at `coordinate` of the mesh holds; of the job, or of `holders` alone.

    A tensor on the part `mesh["fsdp"]` of an (fsdp, tp) mesh, such as a norm, is held alike by all ranks along tp: each
    has it on a part of its own. So the mesh dimensions that the part does not have count as replication.
    """
    index = tuple(slice(None) if isinstance(p, Replicate) else c for p, c in zip(placements, coordinate, strict=True))
    coordinates = part.whole_coordinate_of[part.ranks[index].reshape(-1)]
    dims = [dim for dim, is_dim in enumerate(part.is_dim_of_part) if is_dim]
    held = np.moveaxis(part.whole, dims, range(len(dims)))[tuple(coordinates[:, dims].T)]
    return tuple((np.unique(held) if holders is None else np.intersect1d(held, holders)).tolist())
