"""Whether a DCP directory is whole: its metadata, its files and, where there is one, its manifest agree."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from awscrt.checksums import crc64nvme

from stillframe import names
from stillframe.errors import CorruptCheckpoint, NotACheckpoint
from stillframe.load.folder import Folder, is_inside, listed, read_whole
from stillframe.load.metadata import METADATA_NAME, StoredMetadata, chunk_name
from stillframe.manifest import Manifest, decode_manifest

_OF_RANK = re.compile(r"__(\d+)_\d+\.distcp")


def metadata_content(folder: Folder) -> bytes:
    path = folder.path / METADATA_NAME
    try:
        return read_whole(path, folder.open_own_file(METADATA_NAME))
    except FileNotFoundError as error:
        found = sorted(os.listdir(folder.descriptor))  # noqa: PTH208 - a Path cannot list what a descriptor stands for
        hint = f", but {listed(found)}" if found else ""
        if any(name.endswith(".safetensors") for name in found):
            hint = "; it is a Hugging Face directory, which stillframe.load_hf reads"
        elif "checkpoint" in found:
            hint = f"; the checkpoint is in {folder.path / 'checkpoint'}"
        elif any(name.endswith(".distcp") for name in found):
            hint = "; its save never came to an end, or the file was lost. Load another checkpoint"
        raise NotACheckpoint(f"{folder.path}: has no {METADATA_NAME}{hint}") from error


def own_manifest(folder: Folder) -> Manifest | None:
    """The manifest of this directory; of one that was published together with an export, its part of both's."""
    content = folder.read_small(names.MANIFEST_NAME)
    if content is not None:
        return decode_manifest(content, folder.path / names.MANIFEST_NAME)
    place = folder.path.resolve()
    published = names.parse_published(place.parent.name)
    if published is None or published[0] != names.TOGETHER:
        return None
    content = folder.read_small(f"../{names.MANIFEST_NAME}")
    if content is None:
        return None
    both = decode_manifest(content, place.parent / names.MANIFEST_NAME)
    prefix = f"{place.name}/"
    return replace(
        both,
        files={name.removeprefix(prefix): entry for name, entry in both.files.items() if name.startswith(prefix)},
        tensors={
            name.removeprefix(prefix): replace(entry, file=entry.file.removeprefix(prefix))
            for name, entry in both.tensors.items()
            if entry.file.startswith(prefix)
        },
    )


def check_files(folder: Folder, metadata: StoredMetadata, manifest: Manifest | None) -> None:
    """Every file is there, of the size it was published with, and no item reaches beyond the end of its file."""
    items = [(key, chunk.blob) for key, state in metadata.tensors.items() for chunk in state.chunks]
    items += list(metadata.objects.items())
    last: dict[str, tuple[int, str]] = {}  # of each file the item that ends last
    for key, blob in items:
        end = blob.offset + blob.length_bytes
        if end > last.get(blob.file, (-1, ""))[0]:
            last[blob.file] = (end, key)
    published = manifest.files if manifest is not None else {}
    wrong = []
    for name in sorted({*last, *published}):
        if not is_inside(name):
            wrong.append(f"{name!r}, which {names.MANIFEST_NAME} lists, is outside of the directory")
            continue
        try:
            size = folder.own_size(name)
        except FileNotFoundError:
            rank = _OF_RANK.fullmatch(name)
            lost = f", which holds what rank {rank[1]} wrote," if rank else ""
            needed = f"; {last[name][1]!r} is in it" if name in last else ""
            wrong.append(f"{name}{lost} is missing{needed}")
            continue
        entry = published.get(name)
        if entry is not None and entry.size != size:
            how = "is truncated" if size < entry.size else "has grown"
            wrong.append(f"{name} {how}: it has {size} bytes, and was published with {entry.size}")
        elif manifest is not None and entry is None:
            wrong.append(f"{name} was not published with this checkpoint, but {last[name][1]!r} is said to be in it")
        elif name in last and size < last[name][0]:
            end, key = last[name]
            wrong.append(f"{name} is truncated: it has {size} bytes, and {key!r} ends at byte {end}")
    if wrong:
        raise CorruptCheckpoint(
            f"{folder.path}: is not whole: {listed(wrong)}. Put back the files as they were saved, or load another "
            "checkpoint"
        )


def with_aliases(manifest: Manifest, metadata: StoredMetadata) -> Manifest:
    """`manifest` with the chunks of tied tensors under each of their keys: they were written, and are listed, once."""
    chunks = [
        (chunk_name(k, chunk.offsets), chunk.blob) for k, state in metadata.tensors.items() for chunk in state.chunks
    ]
    named = {blob: manifest.tensors[name] for name, blob in chunks if name in manifest.tensors}
    aliases = {name: named[blob] for name, blob in chunks if name not in manifest.tensors and blob in named}
    return replace(manifest, tensors={**manifest.tensors, **aliases}) if aliases else manifest


def check_chunks(directory: Path, metadata: StoredMetadata, manifest: Manifest) -> None:
    """Manifest and `.metadata` know the same chunks, in the same places."""
    wrong = []
    known = set()
    for key, state in metadata.tensors.items():
        for chunk in state.chunks:
            name = chunk_name(key, chunk.offsets)
            known.add(name)
            entry, blob = manifest.tensors.get(name), chunk.blob
            if entry is None:
                wrong.append(f"{name} is in {METADATA_NAME} only")
            elif entry.size != chunk.elements * state.dtype.itemsize:
                wrong.append(f"{name} has {entry.size} bytes, which {state.dtype} of sizes {chunk.sizes} has not")
            elif entry.file != blob.file or not (
                blob.offset <= entry.offset and entry.offset + entry.size <= blob.offset + blob.length_bytes
            ):
                there = f"bytes {blob.offset} to {blob.offset + blob.length_bytes} of {blob.file}"
                wrong.append(f"{name} is at byte {entry.offset} of {entry.file}, outside of {there}")
    wrong += [f"{n} is in {names.MANIFEST_NAME} only" for n, e in manifest.tensors.items() if e.size and n not in known]
    if wrong:
        raise CorruptCheckpoint(
            f"{directory}: {names.MANIFEST_NAME} and {METADATA_NAME} disagree; one of them was changed, or is of "
            f"another checkpoint: {listed(wrong)}. Load another checkpoint"
        )


def check_content(path: Path, content: bytes, size: int, crc: str) -> None:
    if len(content) != size:
        how = "is truncated" if len(content) < size else "has grown"
        raise CorruptCheckpoint(f"{path}: {how}: it has {len(content)} bytes, and was published with {size}")
    if (found := f"{crc64nvme(content):016x}") != crc:
        raise CorruptCheckpoint(
            f"{path}: was changed or damaged after it was published: the checksum of bytes 0 to {size} is {found}, not "
            f"{crc}. Load another checkpoint"
        )
