"""Publication: only an attempt that is proven whole gets its name, and then has it whole; nothing else is touched."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from awscrt.checksums import crc64nvme
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.errors import CheckpointExists, SaveFailed
from stillframe.manifest import read_manifest
from stillframe.records import FileReceipt, InlineFile, Receipt, WrittenExtent
from tests.unit.commit.attempts import ATTEMPT, INLINE_FILES, STEP, Attempt, Piece, publish

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WHOLE = Attempt({ONE: [16, 40, 0, 24], TWO: [8, 8]}, world_size=2)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def files_in(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def publish_whole(run_dir: Path, attempt: Attempt = WHOLE, *, overwrite: bool = False, sequence: int = 1) -> Path:
    attempt = replace(attempt, overwrite=overwrite)
    publication = attempt.publication(run_dir)
    publication.prepare(attempt.rank_0_files)
    attempt.write(publication.hidden_dir)
    publish(publication, attempt.receipts(attempt.item_pieces()), sequence=sequence)
    publication.clean_up()
    return publication.final_dir


# What is published


def test_a_whole_attempt_gets_its_name_and_a_manifest_of_all_its_bytes(tmp_path: Path) -> None:
    final_dir = publish_whole(tmp_path, sequence=7)
    assert names(tmp_path) == [f"hf-{STEP}"]
    contents = files_in(final_dir)
    assert contents.pop("stillframe.json")
    assert contents == WHOLE.contents | {file.name: file.content for file in INLINE_FILES}
    manifest = read_manifest(final_dir)
    assert (manifest.kind, manifest.step, manifest.attempt, manifest.sequence) == ("hf", STEP, ATTEMPT, 7)
    assert (manifest.world_size, manifest.layout_digest) == (2, WHOLE.layout.digest)
    assert {name: (entry.size, entry.crc64nvme) for name, entry in manifest.files.items()} == {
        name: (len(content), f"{crc64nvme(content):016x}") for name, content in contents.items()
    }
    assert set(manifest.tensors) == {f"{ONE}/tensor-{i}" for i in (1, 2, 3)} | {f"{TWO}/tensor-1"}
    for entry in manifest.tensors.values():
        tensor_bytes = contents[entry.file][entry.offset : entry.offset + entry.size]
        assert entry.crc64nvme == f"{crc64nvme(tensor_bytes):016x}"


def test_the_config_comes_last_so_that_nobody_loads_what_is_not_whole(tmp_path: Path) -> None:
    publication = WHOLE.publication(tmp_path)
    to_write = publication.prepare(INLINE_FILES)
    assert to_write == WHOLE.small_files(0)
    assert "config.json" not in {file.name for file in to_write}
    assert ".stillframe/config.json" in {file.name for file in to_write}
    WHOLE.write(publication.hidden_dir)
    pieces = WHOLE.item_pieces()
    with pytest.raises(SaveFailed):
        publish(publication, WHOLE.receipts(pieces[1:]))
    assert not (publication.hidden_dir / "config.json").exists()
    publish(publication, WHOLE.receipts(pieces))
    assert (publication.final_dir / "config.json").read_bytes() == INLINE_FILES[0].content
    assert "config.json" in read_manifest(publication.final_dir).files


def test_the_hidden_directory_is_marked_with_its_attempt_from_the_start(tmp_path: Path) -> None:
    publication = WHOLE.publication(tmp_path)
    publication.prepare(INLINE_FILES)
    assert names(tmp_path) == [f".hf-{STEP}.incomplete"]
    assert files_in(publication.hidden_dir) == {f".stillframe/attempt-{ATTEMPT}": WHOLE.layout.digest.encode()}
    publication.clean_up()
    assert names(tmp_path) == []


@st.composite
def tiled_attempts(draw: st.DrawFn) -> tuple[Attempt, list[Piece]]:
    """Any layout, and any tiling of it over any ranks in which no piece crosses an item."""
    lengths = st.lists(st.integers(0, 200), min_size=1, max_size=5)
    items = draw(st.dictionaries(st.sampled_from([ONE, TWO, "model.safetensors"]), lengths, min_size=1))
    items = {name: [8, *rest] for name, rest in items.items()}  # a header is never empty
    world_size = draw(st.integers(1, 4))
    pieces = []
    for name, item_lengths in items.items():
        position = 0
        for length in item_lengths:
            cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
            borders = [0, *cuts, length]
            for low, high in itertools.pairwise(borders):
                if high > low:
                    rank = draw(st.integers(0, world_size - 1))
                    pieces.append(Piece(name, position + low, high - low, rank))
            position += length
    return Attempt(items, world_size), pieces


@contextmanager
def prepared(attempt: Attempt) -> Iterator[Callable[[list[Receipt]], None]]:
    """Everything but the receipts is ready; yields what publishes with them, and checks that it did or did not."""
    with TemporaryDirectory() as directory:
        publication = attempt.publication(Path(directory))
        publication.prepare(attempt.rank_0_files)
        attempt.write(publication.hidden_dir)

        def publish_with(receipts: list[Receipt]) -> None:
            try:
                publish(publication, receipts)
            except SaveFailed:
                assert not publication.final_dir.exists()
                raise
            assert files_in(publication.final_dir).keys() >= attempt.contents.keys()

        yield publish_with


@settings(max_examples=50)
@given(tiled_attempts())
def test_any_tiling_over_any_ranks_is_published_with_the_checksums_of_its_bytes(
    tiled: tuple[Attempt, list[Piece]],
) -> None:
    attempt, pieces = tiled
    with TemporaryDirectory() as directory:
        publication = attempt.publication(Path(directory))
        publication.prepare(attempt.inline_files)
        attempt.write(publication.hidden_dir)
        publish(publication, attempt.receipts(pieces))
        manifest = read_manifest(publication.final_dir)
        for name, content in attempt.contents.items():
            assert manifest.files[name].crc64nvme == f"{crc64nvme(content):016x}"
        for entry in manifest.tensors.values():
            tensor_bytes = attempt.contents[entry.file][entry.offset : entry.offset + entry.size]
            assert entry.crc64nvme == f"{crc64nvme(tensor_bytes):016x}"
        assert len(manifest.tensors) == sum(len(lengths) - 1 for lengths in attempt.items.values())


@settings(max_examples=60)
@given(tiled_attempts(), st.data())
def test_any_single_change_of_what_was_written_is_refused(
    tiled: tuple[Attempt, list[Piece]], data: st.DataObject
) -> None:
    attempt, pieces = tiled
    index = data.draw(st.integers(0, len(pieces) - 1))
    piece = pieces[index]
    how = data.draw(st.sampled_from(["drop", "duplicate", "shift", "resize", "other file"]))
    if how == "drop":
        changed = [*pieces[:index], *pieces[index + 1 :]]
    elif how == "duplicate":
        rank = data.draw(st.integers(0, attempt.world_size - 1))
        changed = [*pieces, replace(piece, rank=rank)]
    elif how == "shift":
        offset = data.draw(st.integers(0, len(attempt.contents[piece.file])).filter(lambda o: o != piece.offset))
        changed = [*pieces[:index], replace(piece, offset=offset), *pieces[index + 1 :]]
    elif how == "resize":
        length = data.draw(st.integers(0, 300).filter(lambda n: n != piece.length))
        changed = [*pieces[:index], replace(piece, length=length), *pieces[index + 1 :]]
    else:
        others = sorted(set(attempt.items) - {piece.file})
        if not others:
            return
        changed = [*pieces[:index], replace(piece, file=data.draw(st.sampled_from(others))), *pieces[index + 1 :]]
    with prepared(attempt) as publish_with, pytest.raises(SaveFailed) as caught:
        publish_with(attempt.receipts(changed))
    assert (caught.value.stage, caught.value.step) == ("vote", STEP)
    assert "safetensors: " in caught.value.reason


# What is refused, and in which words


def test_a_gap_is_named_by_file_and_bytes() -> None:
    pieces = [piece for piece in WHOLE.item_pieces() if piece.offset != 16]
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match=f"{ONE}: bytes 16 to 56 were written by no"):
        publish_with(WHOLE.receipts(pieces))


def test_bytes_written_twice_are_named() -> None:
    pieces = [*WHOLE.item_pieces(), Piece(ONE, 20, 4, 1)]
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match=f"{ONE}: bytes 20 to 56 were written twice"):
        publish_with(WHOLE.receipts(pieces))


def test_a_missing_end_is_named() -> None:
    pieces = [piece for piece in WHOLE.item_pieces() if piece.offset != 56]
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match=f"{ONE}: 56 of 80 bytes were written"):
        publish_with(WHOLE.receipts(pieces))


def test_an_extent_across_items_is_refused_though_all_bytes_are_there() -> None:
    # No CRC of a single tensor could be had from it.
    pieces = [Piece(ONE, 0, 80, 0), Piece(TWO, 0, 8, 0), Piece(TWO, 8, 8, 1)]
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match="an extent crosses the border of the header"):
        publish_with(WHOLE.receipts(pieces))


def test_a_file_that_no_rank_wrote_is_named() -> None:
    pieces = [piece for piece in WHOLE.item_pieces() if piece.file != TWO]
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match=f"{TWO}: no rank wrote any of it"):
        publish_with(WHOLE.receipts(pieces))


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": "0123456789abcdef.2"},
        {"step": STEP + 1},
        {"kind": "dcp"},
        {"world_size": 3},
        {"layout_digest": "b" * 64},
        {"rank": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_receipt_of_anything_else_is_refused(change: dict[str, object]) -> None:
    receipts = WHOLE.receipts(WHOLE.item_pieces())
    receipts[1] = replace(receipts[1], **change)  # type: ignore[arg-type]
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match="receipt of rank 1 is of another attempt"):
        publish_with(receipts)


def test_every_rank_must_have_left_its_receipt() -> None:
    receipts = WHOLE.receipts([replace(piece, rank=0) for piece in WHOLE.item_pieces()])
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match="1 receipts for 2 ranks"):
        publish_with(receipts[:1])
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match="receipt of rank 0 is of another attempt"):
        publish_with(receipts[::-1])


def test_ranks_that_know_a_file_with_different_sizes_are_refused() -> None:
    receipts = WHOLE.receipts(WHOLE.item_pieces())
    files = tuple(replace(file, size_bytes=81) if file.name == ONE else file for file in receipts[1].files)
    receipts[1] = replace(receipts[1], files=files)
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match=f"{ONE}: rank 1 knows it with another size"):
        publish_with(receipts)


def change_inline(receipts: list[Receipt], change: Callable[[FileReceipt], FileReceipt | None]) -> list[Receipt]:
    """Apply `change` to what rank 0 says of config.json; None drops it."""
    files = (change(file) if file.name == ".stillframe/config.json" else file for file in receipts[0].files)
    return [replace(receipts[0], files=tuple(file for file in files if file is not None)), *receipts[1:]]


def test_a_small_file_that_was_not_written_is_missed() -> None:
    receipts = change_inline(WHOLE.receipts(WHOLE.item_pieces()), lambda file: None)
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match=r"config\.json: no rank wrote any of it"):
        publish_with(receipts)


def test_a_small_file_with_another_content_is_refused() -> None:
    def altered(file: FileReceipt) -> FileReceipt:
        return replace(file, extents=(replace(file.extents[0], crc64nvme=file.extents[0].crc64nvme ^ 1),))

    receipts = change_inline(WHOLE.receipts(WHOLE.item_pieces()), altered)
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match=r"config\.json: was written with other"):
        publish_with(receipts)


def test_a_file_that_nobody_asked_for_is_refused() -> None:
    receipts = WHOLE.receipts(WHOLE.item_pieces())
    whole = WrittenExtent(file_offset=0, length_bytes=2, crc64nvme=0)
    other = FileReceipt(name="../outside", size_bytes=2, extents=(whole,))
    receipts[1] = replace(receipts[1], files=(*receipts[1].files, other))
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match="outside: is written, but is no file of"):
        publish_with(receipts)


@pytest.mark.parametrize("name", [ONE, ".stillframe/config.json", "code/model.py"])
@pytest.mark.parametrize("what", ["truncated", "longer", "missing", "a link", "a directory"])
def test_what_is_on_disk_must_be_what_was_written(tmp_path: Path, name: str, what: str) -> None:
    publication = WHOLE.publication(tmp_path)
    publication.prepare(INLINE_FILES)
    WHOLE.write(publication.hidden_dir)
    path = publication.hidden_dir / name
    size = path.stat().st_size
    if what in ("truncated", "longer"):
        os.truncate(path, size - 1 if what == "truncated" else size + 1)
    else:
        path.rename(tmp_path / "elsewhere")
    if what == "a link":
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "a directory":
        path.mkdir()
    said = {
        "truncated": f"has {size - 1} bytes on disk, not {size}",
        "longer": f"has {size + 1} bytes on disk, not {size}",
        "missing": "was written, and is not there any more",
        "a link": "is not a regular file any more",
        "a directory": "is not a regular file any more",
    }[what]
    with pytest.raises(SaveFailed, match=f"{name}: {said}") as caught:
        publish(publication, WHOLE.receipts(WHOLE.item_pieces()))
    assert caught.value.rank == 0
    assert not publication.final_dir.exists()
    publication.clean_up()
    assert not publication.hidden_dir.exists()


# Files that one rank writes whole, and files in subdirectories

STATES = tuple(InlineFile(name=f"checkpoint/state/rank-{r:05d}.pt", content=b"rng" * (r + 1)) for r in range(2))
BOTH = Attempt(
    {"hf/model.safetensors": [16, 40], "checkpoint/__1_0.distcp": [8]},
    world_size=2,
    kind="step",
    inline_files=(
        InlineFile(name="hf/config.json", content=b"{}"),
        InlineFile(name="checkpoint/.metadata", content=b"pickled"),
    ),
    held_back=("hf/config.json", "checkpoint/.metadata"),
    rank_files=STATES,
)


def test_files_in_subdirectories_are_held_back_and_published_like_any_other(tmp_path: Path) -> None:
    publication = BOTH.publication(tmp_path)
    to_write = publication.prepare(BOTH.rank_0_files)
    assert to_write == BOTH.small_files(0)
    assert {".stillframe/hf/config.json", ".stillframe/checkpoint/.metadata"} <= {file.name for file in to_write}
    BOTH.write(publication.hidden_dir)
    assert not (publication.hidden_dir / "hf/config.json").exists()
    publish(publication, BOTH.receipts(BOTH.item_pieces()))
    contents = files_in(publication.final_dir)
    assert contents.pop("stillframe.json")
    assert contents == BOTH.contents | {file.name: file.content for file in (*BOTH.inline_files, *STATES)}
    manifest = read_manifest(publication.final_dir)
    assert {name: (entry.size, entry.crc64nvme) for name, entry in manifest.files.items()} == {
        name: (len(content), f"{crc64nvme(content):016x}") for name, content in contents.items()
    }
    assert (manifest.branch, manifest.metrics) == ("main", {"loss": 0.5})


def change_state(change: Callable[[FileReceipt], Iterable[FileReceipt]], *, rank: int = 1) -> list[Receipt]:
    """The receipts, but for what `rank` says of its own file."""
    receipts = BOTH.receipts(BOTH.item_pieces())
    files = [new for file in receipts[rank].files for new in (change(file) if "state" in file.name else (file,))]
    receipts[rank] = replace(receipts[rank], files=tuple(files))
    return receipts


def extents(*runs: tuple[int, int]) -> Callable[[FileReceipt], Iterable[FileReceipt]]:
    """Its content said to be in these runs of bytes."""
    written = tuple(WrittenExtent(file_offset=offset, length_bytes=length, crc64nvme=0) for offset, length in runs)
    return lambda file: (replace(file, extents=written),)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: (), "no rank wrote any of it"),
        (lambda file: (file, file), r"in one piece, and was by rank 1 \(1 extents\), rank 1 \(1 extents\)"),
        (extents((0, 3), (3, 3)), r"in one piece, and was by rank 1 \(2 extents\)"),
        (extents(), r"in one piece, and was by rank 1 \(0 extents\)"),
        (extents((1, 5)), "bytes 0 to 1 were written by no rank"),
        (extents((0, 5)), "5 of 6 bytes were written"),
        (lambda file: (replace(file, size_bytes=7),), "6 of 7 bytes were written"),
        (lambda file: [replace(f, size_bytes=7) for f in extents((0, 7))(file)], "has 6 bytes on disk, not 7"),
        (lambda file: (replace(file, name="checkpoint/state/rank-00002.pt"),), "no rank wrote any of it"),
        (lambda file: (file, replace(file, name="checkpoint/state/rank-00002.pt")), "is no file of this checkpoint"),
    ],
)
def test_a_ranks_own_file_must_be_whole_and_from_that_rank(
    change: Callable[[FileReceipt], Iterable[FileReceipt]], said: str
) -> None:
    with prepared(BOTH) as publish_with, pytest.raises(SaveFailed, match=rf"rank-0000[12]\.pt: .*{said}"):
        publish_with(change_state(change))


def test_ranks_do_not_write_each_others_files() -> None:
    receipts = BOTH.receipts(BOTH.item_pieces())
    states = [file for receipt in receipts for file in receipt.files if "state" in file.name]
    both_by_0 = replace(receipts[0], files=(*receipts[0].files, states[1]))
    none_by_1 = replace(receipts[1], files=tuple(file for file in receipts[1].files if "state" not in file.name))
    for changed in ([both_by_0, none_by_1], [both_by_0, receipts[1]]):
        with prepared(BOTH) as publish_with, pytest.raises(SaveFailed, match=r"rank-00001\.pt: should be .* by rank 1"):
            publish_with(changed)


def test_what_rank_0_says_of_its_own_file_must_be_what_it_was_given() -> None:
    def altered(file: FileReceipt) -> Iterable[FileReceipt]:
        return (replace(file, extents=(replace(file.extents[0], crc64nvme=1),)),)

    with prepared(BOTH) as publish_with, pytest.raises(SaveFailed, match=r"rank-00000\.pt: was written with other"):
        publish_with(change_state(altered, rank=0))


def test_the_plan_must_be_written_too() -> None:
    receipts = WHOLE.receipts(WHOLE.item_pieces())
    files = tuple(file for file in receipts[0].files if "plan" not in file.name)
    with prepared(WHOLE) as publish_with, pytest.raises(SaveFailed, match=r"plan\.json: no rank wrote any of it"):
        publish_with([replace(receipts[0], files=files), receipts[1]])


# A step that exists


def test_a_published_step_is_refused_and_untouched(tmp_path: Path) -> None:
    final_dir = publish_whole(tmp_path)
    before = files_in(final_dir)
    again = Attempt(WHOLE.items, 2, attempt="0123456789abcdef.2", salt="new")
    publication = again.publication(tmp_path)
    with pytest.raises(CheckpointExists, match="it exists already; pass overwrite=True") as caught:
        publication.prepare(INLINE_FILES)
    assert (caught.value.stage, caught.value.path) == ("prepare", final_dir)
    publication.clean_up()
    assert names(tmp_path) == [f"hf-{STEP}"]
    assert files_in(final_dir) == before


def test_overwriting_replaces_all_of_it(tmp_path: Path) -> None:
    final_dir = publish_whole(tmp_path)
    (final_dir / "of-the-first.txt").touch()
    again = Attempt({"model.safetensors": [8, 8]}, 2, (), attempt="0123456789abcdef.2", salt="new")
    publish_whole(tmp_path, again, overwrite=True, sequence=2)
    assert names(tmp_path) == [f"hf-{STEP}"]
    contents = files_in(final_dir)
    assert contents.pop("stillframe.json")
    assert contents == again.contents
    assert read_manifest(final_dir).sequence == 2


def test_overwriting_what_is_not_there_publishes_it(tmp_path: Path) -> None:
    assert publish_whole(tmp_path, overwrite=True).is_dir()
    assert names(tmp_path) == [f"hf-{STEP}"]


def a_directory_without_manifest(final_dir: Path) -> None:
    final_dir.mkdir()
    (final_dir / "model.safetensors").write_bytes(b"mine")


def an_empty_directory(final_dir: Path) -> None:
    final_dir.mkdir()


def a_file(final_dir: Path) -> None:
    final_dir.write_bytes(b"mine")


def a_dangling_link(final_dir: Path) -> None:
    final_dir.symlink_to("nowhere")


def a_link_to_another_checkpoint(final_dir: Path) -> None:
    publish_whole(final_dir.parent, replace(WHOLE, step=STEP - 1))
    final_dir.symlink_to(f"hf-{STEP - 1}")


def a_link_to_the_same_step(final_dir: Path) -> None:
    elsewhere = final_dir.parent / "elsewhere"
    elsewhere.mkdir()
    publish_whole(elsewhere)
    final_dir.symlink_to(f"elsewhere/hf-{STEP}")


def a_copy_of_another_step(final_dir: Path) -> None:
    publish_whole(final_dir.parent, replace(WHOLE, step=STEP - 1)).rename(final_dir)


def a_torn_manifest(final_dir: Path) -> None:
    publish_whole(final_dir.parent)
    os.truncate(final_dir / "stillframe.json", 100)


FOREIGN = [
    a_directory_without_manifest,
    an_empty_directory,
    a_file,
    a_dangling_link,
    a_link_to_another_checkpoint,
    a_link_to_the_same_step,
    a_copy_of_another_step,
    a_torn_manifest,
]


def everything(directory: Path) -> dict[str, object]:
    """What is in a directory, links as links."""
    return {
        str(path.relative_to(directory)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(directory.rglob("*"))
    }


@pytest.mark.parametrize("make_foreign", FOREIGN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_checkpoint_of_that_step_is_never_replaced(
    tmp_path: Path, make_foreign: Callable[[Path], None], overwrite: bool
) -> None:
    make_foreign(tmp_path / f"hf-{STEP}")
    before = everything(tmp_path)
    publication = replace(WHOLE, attempt="0123456789abcdef.2", overwrite=overwrite).publication(tmp_path)
    said = "is not a checkpoint of stillframe of that step .*; move it away" if overwrite else "pass overwrite=True"
    with pytest.raises(CheckpointExists, match=said):
        publication.prepare(INLINE_FILES)
    publication.clean_up()
    assert everything(tmp_path) == before


@pytest.mark.parametrize("make_foreign", FOREIGN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_it_is_written_is_not_replaced_either(
    tmp_path: Path, make_foreign: Callable[[Path], None], overwrite: bool
) -> None:
    attempt = replace(WHOLE, attempt="0123456789abcdef.2", overwrite=overwrite)
    publication = attempt.publication(tmp_path)
    publication.prepare(INLINE_FILES)
    attempt.write(publication.hidden_dir)
    hidden = publication.hidden_dir.rename(tmp_path.with_name("aside"))
    make_foreign(publication.final_dir)  # some of these use the same hidden name
    hidden.rename(publication.hidden_dir)
    before = {name: what for name, what in everything(tmp_path).items() if ".incomplete" not in name}
    with pytest.raises(CheckpointExists):
        publish(publication, attempt.receipts(attempt.item_pieces()))
    publication.clean_up()
    assert everything(tmp_path) == before


def test_while_it_is_replaced_a_reader_always_finds_one_whole_version(tmp_path: Path) -> None:
    rounds = 40
    versions = [Attempt(WHOLE.items, 2, attempt=f"0123456789abcdef.{i}", salt=str(i)) for i in range(rounds)]
    allowed = {tuple(sorted(version.contents.items())) for version in versions}
    final_dir = publish_whole(tmp_path, versions[0])
    reading, done = threading.Event(), threading.Event()
    seen = 0
    errors: list[BaseException] = []

    def read_once() -> None:
        nonlocal seen
        directory = os.open(final_dir, os.O_RDONLY | os.O_DIRECTORY)  # it is there at every instant
        try:
            found = []
            for name in WHOLE.items:
                with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=directory), "rb") as file:
                    found.append((name, file.read()))
            assert tuple(sorted(found)) in allowed
            seen += 1
        except FileNotFoundError:
            # Only what has lost the name is ever deleted.
            assert os.fstat(directory).st_ino != final_dir.stat().st_ino
        finally:
            os.close(directory)

    def read() -> None:
        try:
            while not done.is_set():
                read_once()
                reading.set()
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)
            reading.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(60)
    for sequence, version in enumerate(versions[1:], start=2):
        publish_whole(tmp_path, version, overwrite=True, sequence=sequence)
    done.set()
    reader.join(60)
    assert not errors, errors
    assert seen
    assert names(tmp_path) == [f"hf-{STEP}"]


# What an earlier attempt left


@pytest.mark.parametrize("left_whole", [False, True])
def test_what_a_killed_run_left_under_the_hidden_name_makes_room(tmp_path: Path, left_whole: bool) -> None:
    killed = replace(WHOLE, attempt="fedcba9876543210.1")
    left = killed.publication(tmp_path)
    left.prepare(INLINE_FILES)
    if left_whole:
        killed.write(left.hidden_dir)
    (left.hidden_dir / "of-the-killed-run.txt").touch()
    final_dir = publish_whole(tmp_path)
    assert names(tmp_path) == [f"hf-{STEP}"]
    assert not (final_dir / "of-the-killed-run.txt").exists()


def test_a_leftover_that_cannot_be_removed_does_not_cost_the_checkpoint(
    tmp_path: Path, immutable: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    left = WHOLE.publication(tmp_path)
    left.prepare(INLINE_FILES)
    (left.hidden_dir / "sub").mkdir()
    (left.hidden_dir / "sub/stubborn").touch()
    immutable(left.hidden_dir / "sub/stubborn")
    publish_whole(tmp_path)
    (retired,) = [name for name in names(tmp_path) if ".retired-" in name]
    assert f"stays as {tmp_path / retired}" in caplog.text
    assert names(tmp_path) == [retired, f"hf-{STEP}"]


def test_a_leftover_that_keeps_the_hidden_name_is_an_error(tmp_path: Path, immutable: Callable[[Path], None]) -> None:
    left = WHOLE.publication(tmp_path)
    left.prepare(INLINE_FILES)
    immutable(left.hidden_dir)
    with pytest.raises(OSError, match=r"\.hf-5\.incomplete"):
        WHOLE.publication(tmp_path).prepare(INLINE_FILES)


@pytest.mark.parametrize("how_far", ["prepared", "written", "left whole"])
def test_a_job_that_fails_late_does_not_remove_its_successors_directory(tmp_path: Path, how_far: str) -> None:
    late = WHOLE.publication(tmp_path)
    late.prepare(INLINE_FILES)
    successor = replace(WHOLE, attempt="fedcba9876543210.1")
    publication = successor.publication(tmp_path)
    publication.prepare(INLINE_FILES)
    if how_far != "prepared":
        successor.write(publication.hidden_dir)
    if how_far == "left whole":  # replaced by a third attempt, whose process ended before it could remove it
        publish(publication, successor.receipts(successor.item_pieces()))
        publication.final_dir.rename(publication.hidden_dir)
    before = files_in(publication.hidden_dir)
    with pytest.raises(SaveFailed):
        publish(late, WHOLE.receipts(WHOLE.item_pieces()[1:]))
    late.clean_up()
    assert files_in(publication.hidden_dir) == before


def test_cleaning_up_what_is_not_there_is_fine(tmp_path: Path) -> None:
    publication = WHOLE.publication(tmp_path / "absent")
    publication.clean_up()
    with pytest.raises(FileNotFoundError):
        publication.prepare((InlineFile(name="config.json", content=b""),))
    publication.clean_up()
    assert names(tmp_path) == []
