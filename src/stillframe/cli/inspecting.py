"""What `stillframe inspect` prints: what is in a published export or checkpoint, by its headers and its manifest."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from stillframe.cli.listing import format_metrics, format_size, local_time, printable
from stillframe.load.checking import own_manifest
from stillframe.load.directory import open_weights, read_header
from stillframe.load.distcp import open_distcp
from stillframe.load.folder import open_folder
from stillframe.load.metadata import METADATA_NAME
from stillframe.load.safetensors import StoredTensor
from stillframe.manifest import Manifest
from stillframe.names import CHECKPOINT_PART, EXPORT_PART, TOGETHER
from stillframe.records import time_of

_NAMED = 10
_ADAPTER = re.compile(r"([^/]+/)?adapter_model(-[0-9]{5}-of-[0-9]{5})?\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedTensor:
    """A tensor as it is stored. `pieces`: in how many parts; `files`: in which files they lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    pieces: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """One export or checkpoint. `manifest` is None where stillframe did not write it."""

    path: Path
    format: str
    tensors: tuple[ListedTensor, ...]
    manifest: Manifest | None


def inspect(directory: Path) -> list[Inspected]:
    """What is in `directory`; of a `step-<N>`, its export and its checkpoint. Reads headers, no tensor data.

    Raises NotACheckpoint, CorruptCheckpoint and LoadError as a load does.
    """
    with open_folder(directory) as folder:
        manifest = own_manifest(folder)
        is_distcp = folder.read_small(METADATA_NAME) is not None
    if manifest is not None and manifest.kind == TOGETHER and not is_distcp and (directory / EXPORT_PART).is_dir():
        return [part for name in (EXPORT_PART, CHECKPOINT_PART) for part in inspect(directory / name)]
    if is_distcp:
        return [Inspected(path=directory, format="checkpoint", tensors=_chunked(directory), manifest=manifest)]
    adapters = sorted(name for name in (manifest.files if manifest is not None else ()) if _ADAPTER.fullmatch(name))
    tensors = _of_adapters(directory, adapters) if adapters else _stored(directory)
    return [Inspected(path=directory, format="hf", tensors=tensors, manifest=manifest)]


def _stored(directory: Path) -> tuple[ListedTensor, ...]:
    with open_weights(directory) as files:
        return tuple(_listed(tensor, tensor.name, file.path.name) for file in files for tensor in file.tensors)


def _of_adapters(directory: Path, file_names: Sequence[str]) -> tuple[ListedTensor, ...]:
    """Those of PEFT's adapters; the names of one in a folder begin with it."""
    found: list[ListedTensor] = []
    with open_folder(directory) as folder:
        for file_name in file_names:
            size = folder.own_size(file_name)
            descriptor = folder.open_own_file(file_name)
            try:
                file = read_header(directory / file_name, descriptor, size)
            finally:
                os.close(descriptor)
            inside = file_name[: file_name.rfind("/") + 1]
            found += [_listed(tensor, inside + tensor.name, file_name) for tensor in file.tensors]
    return tuple(found)


def _listed(tensor: StoredTensor, name: str, file_name: str) -> ListedTensor:
    return ListedTensor(
        name=name,
        dtype=_name_of(tensor.dtype),
        shape=tensor.shape,
        size_bytes=tensor.length_bytes,
        pieces=1,
        files=(file_name,),
    )


def _chunked(directory: Path) -> tuple[ListedTensor, ...]:
    with open_distcp(directory) as opened:
        return tuple(
            ListedTensor(
                name=name,
                dtype=_name_of(state.dtype),
                shape=state.shape,
                size_bytes=math.prod(state.shape) * state.dtype.itemsize,
                pieces=len(state.chunks),
                files=tuple(sorted({chunk.blob.file for chunk in state.chunks})),
            )
            for name, state in sorted(opened.tensors.items())
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def format_inspected(found: Sequence[Inspected], *, tensors: bool) -> str:
    """For people: a summary of each; with `tensors` a line for each tensor."""
    return "\n".join("".join(f"{line}\n" for line in _lines(part, tensors=tensors)) for part in found)


def _lines(part: Inspected, *, tensors: bool) -> list[str]:
    lines = [f"{part.path}", *_origin(part.manifest)]
    elements, sizes = Counter[str](), Counter[str]()
    for tensor in part.tensors:
        elements[tensor.dtype] += math.prod(tensor.shape)
        sizes[tensor.dtype] += tensor.size_bytes
    total = sum(elements.values())
    lines.append(f"  {len(part.tensors)} tensors, {total:,} elements, {format_size(sum(sizes.values()))}")
    lines += [
        f"    {dtype}: {count:,} elements, {format_size(sizes[dtype])}" for dtype, count in elements.most_common()
    ]
    if tensors:
        width = max((len(printable(tensor.name)) for tensor in part.tensors), default=0)
        lines += [f"  {_tensor_line(tensor, width)}" for tensor in part.tensors]
    return lines


def _origin(manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return ["  not written by stillframe: no stillframe.json"]
    made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    commit = "" if manifest.git_commit is None else f", commit {manifest.git_commit}"
    ranks = "1 rank"
    if manifest.world_size != 1:
        ranks = f"{manifest.world_size} ranks, of which none wrote more than {manifest.balance:g} times the mean"
    lines = [
        f"  {manifest.kind} of step {manifest.step}, published {local_time(time_of(manifest.published_at))} by {ranks}",
        f"  {len(manifest.files)} files, {format_size(manifest.size_bytes)}",
        f"  with {made}{commit}",
    ]
    if (done := manifest.reshuffled) is not None:
        lines.append(f"  {done.tensors} tensors, {format_size(done.size_bytes)}, exchanged among ranks to whole rows")
    if (made_whole := manifest.gathered) is not None:
        lines.append(f"  {len(made_whole.keys)} tensors that one rank made of what several held:")
        lines += [f"    {printable(key)}" for key in made_whole.keys[:_NAMED]]
        if len(made_whole.keys) > _NAMED:
            lines.append(f"    and {len(made_whole.keys) - _NAMED} more: `gathered` in stillframe.json")
    if manifest.branch:
        lines.append(f"  branch {printable(manifest.branch)}")
    if manifest.metrics:
        lines.append(f"  {format_metrics(manifest.metrics)}")
    return lines


def _tensor_line(tensor: ListedTensor, width: int) -> str:
    pieces = "" if tensor.pieces == 1 else f", {tensor.pieces} pieces"
    where = tensor.files[0] if len(tensor.files) == 1 else f"{len(tensor.files)} files"
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return (
        f"{printable(tensor.name):<{width}}  {tensor.dtype} {shape}, {format_size(tensor.size_bytes)}{pieces}, {where}"
    )


def inspected_as_json(found: Sequence[Inspected]) -> str:
    """For programs: an array; sizes in bytes. The manifest's own fields are in `stillframe.json`."""
    return (
        json.dumps(
            [
                {
                    "path": str(part.path.absolute()),
                    "format": part.format,
                    "tensors": [asdict(tensor) for tensor in part.tensors],
                }
                for part in found
            ],
            indent=1,
        )
        + "\n"
    )
