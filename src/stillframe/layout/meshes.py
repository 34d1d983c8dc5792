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
class MeshPlace:
    """This rank's place in a mesh, and the mesh's in the one that spans the job; `mesh` is kept so that its id is.

    `identity` says the same on all ranks: which ranks the mesh (and its likes, for the other ranks) puts where.
    """

    mesh: DeviceMesh
    ranks: npt.NDArray[np.int64]
    coordinate: tuple[int, ...]
    whole: npt.NDArray[np.int64]
    whole_coordinate_of: npt.NDArray[np.int64]
    is_dim_of_part: tuple[bool, ...]
    identity: str


def place_in_mesh(name: str, mesh: DeviceMesh, everyone: tuple[int, ...]) -> MeshPlace:
    """This rank's place in `mesh`, over which the tensor `name` is distributed, in a job of the ranks `everyone`.

    Raises UnsupportedPlacement unless `mesh` is one that spans the job, or a part of such a mesh.
    """
    whole = np.asarray(mesh._get_root_mesh().mesh.numpy(), dtype=np.int64)
    flat = whole.reshape(-1)
    if not np.array_equal(np.sort(flat), np.arange(len(everyone))):
        raise UnsupportedPlacement(
            f"{name}: its mesh {mesh} belongs to one of ranks {sorted(flat.tolist())} but the job has ranks "
            f"0..{len(everyone) - 1}; a tensor must be distributed over a mesh that spans all ranks of the job, or "
            "over a part of such a mesh"
        )
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank of a mesh that spans all ranks has a coordinate"
    ranks = np.asarray(mesh.mesh.numpy(), dtype=np.int64)
    coordinate_of = np.stack(np.unravel_index(np.argsort(flat), whole.shape), axis=-1)
    extents = [len(np.unique(column)) for column in coordinate_of[ranks.reshape(-1)].T]
    if math.prod(extents) != ranks.size:
        raise UnsupportedPlacement(f"{name}: its mesh {ranks.tolist()} is no regular part of {whole.tolist()}")
    is_dim_of_part = tuple(extent > 1 for extent in extents)
    # Of the meshes that are this one for other ranks, the first along the dimensions that it does not have.
    first = whole[tuple((coordinate_of[ranks] * is_dim_of_part).reshape(-1, whole.ndim).T)]
    return MeshPlace(
        mesh=mesh,
        ranks=ranks,
        coordinate=tuple(coordinate),
        whole=whole,
        whole_coordinate_of=coordinate_of,
        is_dim_of_part=is_dim_of_part,
        identity=hashlib.sha256(repr((whole.tolist(), first.tolist())).encode()).hexdigest(),
    )


def replicas_at(placements: tuple[Placement, ...], place: MeshPlace, coordinate: tuple[int, ...]) -> tuple[int, ...]:
    """All ranks of the job that hold what the one at `coordinate` of the mesh holds.

    A tensor on the part `mesh["fsdp"]` of an (fsdp, tp) mesh, such as a norm, is held alike by all ranks along tp: each
    has it on a part of its own. So the mesh dimensions that the part does not have count as replication.
    """
    index = tuple(slice(None) if isinstance(p, Replicate) else c for p, c in zip(placements, coordinate, strict=True))
    coordinates = place.whole_coordinate_of[place.ranks[index].reshape(-1)]
    dims = [dim for dim, is_dim in enumerate(place.is_dim_of_part) if is_dim]
    held = np.moveaxis(place.whole, dims, range(len(dims)))[tuple(coordinates[:, dims].T)]
    return tuple(np.unique(held).tolist())
