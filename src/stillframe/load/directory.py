"""Which files of a Hugging Face directory hold the weights, opened and checked against each other.

Sources: transformers `modeling_utils.py` (`_get_resolved_checkpoint_files`: which file wins), `utils/hub.py`
(`get_checkpoint_shard_files`: the index).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stillframe.errors import CorruptCheckpoint, NotACheckpoint
from stillframe.load.checking import own_manifest
from stillframe.load.folder import Folder, is_inside, listed, open_folder, read_fully
from stillframe.load.safetensors import LENGTH_BYTES, StoredTensor, header_length, parse_header
from stillframe.manifest import Manifest
from stillframe.names import MANIFEST_NAME

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """An open safetensors file whose header was checked against its size. `descriptor` is open while the context is.

    `checksums`: the CRC64-NVME of each tensor as it was published, by name; None where there is no manifest.
    """

    path: Path
    descriptor: int
    size_bytes: int
    tensors: tuple[StoredTensor, ...]
    checksums: Mapping[str, str] | None = None


@contextmanager
def open_weights(directory: Path) -> Iterator[tuple[WeightFile, ...]]:
    """The weight files of `directory`, by name, open while the context lasts. Reads headers, no tensor data.

    Raises NotACheckpoint where there are no weights to read or the directory was not published, CorruptCheckpoint where
    files are truncated or contradict themselves, the index or `stillframe.json`.
    """
    with open_folder(directory) as place, weights_in(place) as files:
        yield files


@contextmanager
def weights_in(place: Folder) -> Iterator[tuple[WeightFile, ...]]:
    """`open_weights` of a directory that is open already."""
    directory = place.path
    with ExitStack() as stack:
        weight_map = _weight_map(place)
        names = sorted(set(weight_map.values())) if weight_map is not None else [WEIGHTS_NAME]
        opened: dict[str, int] = {}
        absent = []
        for name in names:
            try:
                opened[name] = place.open_file(name)
            except FileNotFoundError:
                absent.append(name)
            else:
                stack.callback(os.close, opened[name])
        if absent:
            raise CorruptCheckpoint(
                f"{directory / INDEX_NAME}: names {len(absent)} files that do not exist: {listed(absent)}"
            )
        sizes = {name: os.fstat(descriptor).st_size for name, descriptor in opened.items()}
        manifest = own_manifest(place)
        _check_manifest(place, manifest, sizes)
        files = tuple(
            replace(read_header(directory / name, opened[name], sizes[name]), checksums=_checksums(manifest, name))
            for name in names
        )
        _check_keys(directory, files, weight_map)
        yield files


def _weight_map(place: Folder) -> dict[str, str] | None:
    """Key -> file name of a sharded checkpoint, or None where all weights are in one file."""
    content = place.read_small(INDEX_NAME)
    names = set(os.listdir(place.descriptor))  # noqa: PTH208 - a Path cannot list what a descriptor stands for
    if content is None:
        if WEIGHTS_NAME not in names:
            raise NotACheckpoint(f"{place.path}: holds neither {WEIGHTS_NAME} nor {INDEX_NAME}{_instead(names)}")
        return None
    weight_map = _parse_index(content, place.path / INDEX_NAME)
    if WEIGHTS_NAME in names and set(weight_map.values()) != {WEIGHTS_NAME}:
        raise CorruptCheckpoint(
            f"{place.path}: holds both {WEIGHTS_NAME} and {INDEX_NAME}, which names other files; one of the two is "
            "left over from an earlier save (transformers would load the former). Delete the stale one"
        )
    return weight_map


def _parse_index(content: bytes, path: Path) -> dict[str, str]:
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: is not valid JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise CorruptCheckpoint(f"{path}: has no weight_map that maps keys to file names")
    for key, name in weight_map.items():
        if not is_inside(name):
            raise CorruptCheckpoint(f"{path}: {key!r} is said to be in {name!r}, which is outside of the directory")
    return weight_map


def _instead(names: set[str]) -> str:
    """What a directory without weights that can be loaded holds, in the user's terms."""
    if ".metadata" in names:
        return "; it is a torch.distributed.checkpoint directory, which dcp.load reads"
    if "adapter_config.json" in names:
        return "; it is an adapter, which peft.PeftModel.from_pretrained loads onto its base model"
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if pickled:
        return f", but {listed(pickled)}; pickled weights are not loaded, convert them to safetensors first"
    others = sorted(name for name in names if name.endswith(".safetensors"))
    return f", but {listed(others)}, which is no name that from_pretrained loads" if others else ""


def _checksums(manifest: Manifest | None, file_name: str) -> Mapping[str, str] | None:
    if manifest is None:
        return None
    return {name: entry.crc64nvme for name, entry in manifest.tensors.items() if entry.file == file_name}


def _check_manifest(place: Folder, manifest: Manifest | None, sizes: Mapping[str, int]) -> None:
    """Where stillframe published the directory, every file of weights must have the size it was published with."""
    if manifest is None:
        return
    published = manifest.files
    wrong = [f"{name} (was not published)" for name in sizes if name not in published]
    for name, entry in published.items():
        if name in sizes and sizes[name] != entry.size:
            how = "is truncated" if sizes[name] < entry.size else "has grown"
            wrong.append(f"{name} ({how}: has {sizes[name]} bytes, was published with {entry.size})")
        elif name not in sizes and name.endswith(".safetensors"):
            wrong.append(f"{name} (was published, is not there or not in the index)")
    if wrong:
        raise CorruptCheckpoint(
            f"{place.path}: not what was published: {listed(wrong)}. Load another checkpoint; or, if the files were "
            f"replaced on purpose, delete {MANIFEST_NAME}"
        )


def read_header(path: Path, descriptor: int, size: int) -> WeightFile:
    """An open file of `size` bytes with its header, checked against it. Raises CorruptCheckpoint."""
    prefix = read_fully(path, descriptor, 0, min(LENGTH_BYTES, size))
    length = header_length(prefix, file_bytes=size, file_name=str(path))
    header = read_fully(path, descriptor, LENGTH_BYTES, length)
    tensors = parse_header(header, file_bytes=size, file_name=str(path))
    return WeightFile(path=path, descriptor=descriptor, size_bytes=size, tensors=tensors)


def _check_keys(directory: Path, files: Sequence[WeightFile], weight_map: Mapping[str, str] | None) -> None:
    """Each key is in one file only, and in the one that the index says."""
    places: dict[str, Path] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in places:
                raise CorruptCheckpoint(f"{file.path}: {tensor.name!r} is in {places[tensor.name]} too")
            places[tensor.name] = file.path
    astray = [f"{key!r} in {name}" for key, name in (weight_map or {}).items() if places.get(key) != directory / name]
    if astray:
        raise CorruptCheckpoint(
            f"{directory / INDEX_NAME}: names {len(astray)} keys that are not in the file it says: {listed(astray)}"
        )
