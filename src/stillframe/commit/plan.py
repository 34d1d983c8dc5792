"""The plan of an attempt, `.stillframe/plan.json`: all that it takes to prove and publish it without the job.

Rank 0's writer writes it with the other small files. One line of JSON; that it is whole, rank 0's receipt tells by its
size and CRC. Items tile their files, so their names and lengths say where they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from awscrt.checksums import crc64nvme

from stillframe import names
from stillframe.fields import array, crc64, flag, integer, required, table, text
from stillframe.manifest import FileEntry, decode_metrics, finite_metrics
from stillframe.records import FileLayout, Gathered, InlineFile, Item, Layout, Reshuffled

FORMAT = "stillframe-plan/1"

_KEPT_TEXTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptPlan:
    """What one attempt is to become. `inline_files` are rank 0's small files, by the names that they will have."""

    kind: str
    step: int
    attempt: str
    overwrite: bool
    layout: Layout
    inline_files: Mapping[str, FileEntry] = field(default_factory=dict)
    git_commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    branch: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def held_back(self) -> tuple[str, ...]:
        """The small files that are staged in the work directory until all is proven."""
        return tuple(name for name in self.layout.held_back if name in self.inline_files)

    def written_name(self, name: str) -> str:
        """The name under which the small file `name` is written."""
        return names.staged_name(name) if name in self.layout.held_back else name


def entry(content: bytes) -> FileEntry:
    return FileEntry(size=len(content), crc64nvme=f"{crc64nvme(content):016x}")


def entries(files: Iterable[InlineFile]) -> dict[str, FileEntry]:
    return {file.name: entry(file.content) for file in files}


def encode_plan(plan: AttemptPlan) -> bytes:
    """The content of the plan file. Of a layout that was encoded lately, that part is not made again."""
    head = json.dumps(
        {
            "format": FORMAT,
            "kind": plan.kind,
            "step": plan.step,
            "attempt": plan.attempt,
            "overwrite": plan.overwrite,
            "inline_files": [
                {"name": name, "size_bytes": file.size, "crc64nvme": file.crc64nvme}
                for name, file in plan.inline_files.items()
            ],
            "git_commit": plan.git_commit,
            "versions": dict(plan.versions),
            "branch": plan.branch,
            "metrics": finite_metrics(plan.metrics),
        },
        separators=(",", ":"),
    )
    return f'{head[:-1]},"layout":{_texts.of(plan.layout)}}}\n'.encode("ascii")


class _Texts:
    """Layouts as JSON, the few last ones: a run saves the same ones again and again."""

    def __init__(self) -> None:
        self._kept: list[tuple[Layout, str]] = []

    def of(self, layout: Layout) -> str:
        # By identity: to compare two layouts of 20,000 tensors costs as much as to encode one.
        for kept, text_of_kept in self._kept:
            if kept is layout:
                return text_of_kept
        made = json.dumps(_layout_to_object(layout), separators=(",", ":"))
        self._kept = [*self._kept[-_KEPT_TEXTS + 1 :], (layout, made)]
        return made


_texts = _Texts()


def _layout_to_object(layout: Layout) -> dict[str, Any]:
    return {
        "format": layout.format,
        "world_size": layout.world_size,
        "digest": layout.digest,
        "rank_files": layout.rank_files,
        "held_back": layout.held_back,
        "gathered": None if layout.gathered is None else asdict(layout.gathered),
        "reshuffled": None if layout.reshuffled is None else asdict(layout.reshuffled),
        "files": [
            {
                "name": file.name,
                "size_bytes": file.size_bytes,
                "item_names": [item.name for item in file.items],
                "item_bytes": [item.length_bytes for item in file.items],
            }
            for file in layout.files
        ],
    }


def decode_plan(content: bytes) -> AttemptPlan:
    """The plan in the content of a plan file; ValueError, which says what is wrong, if it is none."""
    try:
        data = json.loads(content)
        if text(data, "format") != FORMAT:
            raise ValueError(f"the format is {data['format']!r:.60}, not {FORMAT}")
        return AttemptPlan(
            kind=text(data, "kind"),
            step=integer(data, "step"),
            attempt=text(data, "attempt"),
            overwrite=flag(data, "overwrite"),
            layout=_layout_from_object(table(data, "layout")),
            inline_files={
                _name(file, "name"): FileEntry(
                    size=integer(file, "size_bytes"), crc64nvme=f"{crc64(text(file, 'crc64nvme')):016x}"
                )
                for file in array(data, "inline_files")
            },
            git_commit=None if required(data, "git_commit") is None else text(data, "git_commit"),
            versions={name: text(table(data, "versions"), name) for name in table(data, "versions")},
            branch=text(data, "branch"),
            metrics=decode_metrics(table(data, "metrics")),
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the plan cannot be used: {error}") from error


def _layout_from_object(data: dict[str, Any]) -> Layout:
    files = tuple(_file_from_object(file) for file in array(data, "files"))
    world_size = integer(data, "world_size")
    rank_files = _names(data, "rank_files")
    if rank_files and len(rank_files) != world_size:
        raise ValueError(f"{len(rank_files)} files of ranks for {world_size} ranks")
    return Layout(
        format=text(data, "format"),
        world_size=world_size,
        files=files,
        inline_files=(),
        total_bytes=sum(file.size_bytes for file in files),
        digest=text(data, "digest"),
        rank_files=rank_files,
        held_back=_names(data, "held_back"),
        gathered=None if data.get("gathered") is None else _gathered_from_object(table(data, "gathered")),
        reshuffled=None if data.get("reshuffled") is None else _reshuffled_from_object(table(data, "reshuffled")),
    )


def _reshuffled_from_object(data: dict[str, Any]) -> Reshuffled:
    return Reshuffled(
        tensors=integer(data, "tensors"),
        size_bytes=integer(data, "size_bytes"),
        bucket_bytes=integer(data, "bucket_bytes"),
    )


def _gathered_from_object(data: dict[str, Any]) -> Gathered:
    keys = array(data, "keys")
    if not all(isinstance(key, str) for key in keys):
        raise ValueError(f"gathered keys are {keys!r:.60}")
    return Gathered(keys=tuple(keys), bucket_bytes=integer(data, "bucket_bytes"))


def _file_from_object(data: Any) -> FileLayout:
    item_names, item_bytes = array(data, "item_names"), array(data, "item_bytes")
    if len(item_names) != len(item_bytes):
        raise ValueError(f"{len(item_names)} names of items, and {len(item_bytes)} lengths")
    items, position = [], 0
    for name, length in zip(item_names, item_bytes, strict=True):
        if not isinstance(name, str) or type(length) is not int or length < 0:
            raise ValueError(f"an item has the name {name!r:.60} and the length {length!r:.60}")
        items.append(Item(name=name, file_offset=position, length_bytes=length))
        position += length
    if position != integer(data, "size_bytes"):
        raise ValueError(f"items of {position} bytes in a file of {integer(data, 'size_bytes')}")
    return FileLayout(name=_name(data, "name"), size_bytes=position, items=tuple(items))


def _names(data: Any, key: str) -> tuple[str, ...]:
    return tuple(_name({key: name}, key) for name in array(data, key))


def _name(data: Any, key: str) -> str:
    """The name of a file of the checkpoint: inside of its directory, and none of those that the commit makes itself."""
    name = text(data, key)
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r:.60} is no name inside a directory")
    if parts[0] == names.WORK_DIR_NAME or name == names.MANIFEST_NAME:
        raise ValueError(f"{name!r:.60} is a name of stillframe's own")
    return name
