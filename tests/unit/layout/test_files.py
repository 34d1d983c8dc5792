"""Files of keys: splitting, headers and index are those of the Hub, safetensors and json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from stillframe.errors import LayoutError
from stillframe.layout.files import SAFETENSORS_DTYPES, lay_out, split_into_shards
from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.placement import Holding
from stillframe.layout.runs import Runs
from stillframe.records import Layout

SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6)), min_size=1, max_size=25)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")


def _key(name: str, shape: tuple[int, ...], dtype: torch.dtype, block: int, block_bytes: int) -> Key:
    count = torch.Size(shape).numel()
    runs = Runs.of([(0, 0, 0, count)] if count else [])
    return Key(name=name, dtype=dtype, shape=shape, runs=runs, block=block, block_bytes=block_bytes)


@given(SIZES, st.integers(1, 100))
def test_keys_are_split_as_the_hub_splits_them(sizes: list[tuple[int, int]], max_elements: int) -> None:
    """Tensors with the same second number are views of one storage."""
    storages = {group: torch.zeros(50, dtype=torch.uint8) for _, group in sizes if group > 2}
    state, keys = {}, []
    for index, (size, group) in enumerate(sizes):
        name = f"t{index}"
        state[name] = storages[group][:size] if group > 2 else torch.zeros(size, dtype=torch.uint8)
        block, block_bytes = (group, 50) if group > 2 else (1000 + index, size)
        keys.append(_key(name, (size,), torch.uint8, block, block_bytes))
    expected = split_torch_state_dict_into_shards(state, max_shard_size=max_elements)
    shards, total_bytes = split_into_shards(keys, max_elements)
    # Within a file the format itself orders tensors.
    assert [{key.name for key in shard} for shard in shards] == list(map(set, expected.filename_to_tensors.values()))
    assert total_bytes == expected.metadata["total_size"]


@given(st.dictionaries(NAMES, st.sampled_from(list(SAFETENSORS_DTYPES)), min_size=1, max_size=12), st.data())
def test_headers_are_what_safetensors_writes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.dtype], data: st.DataObject
) -> None:
    # save_file does not write the e8m0 dtype's zeros differently from any other: one byte each.
    shapes = {name: tuple(data.draw(st.lists(st.integers(0, 4), max_size=3))) for name in tensors}
    state = {n: torch.zeros(torch.Size(shapes[n]).numel() * d.itemsize, dtype=torch.uint8) for n, d in tensors.items()}
    state = {n: raw.view(tensors[n]).reshape(shapes[n]) for n, raw in state.items()}
    path = tmp_path_factory.mktemp("reference") / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    keys = tuple(_key(n, shapes[n], d, i, state[n].nbytes) for i, (n, d) in enumerate(tensors.items()))
    holding = Holding(runs=Runs.of([(0, 0, 0, 4**3)]), replicas=(0,), signature="")
    layout, items = lay_out(
        KeyMap(sources=("s",), keys=keys),
        {"s": holding},
        source_dtypes=[torch.uint8],
        max_shard_bytes=10**9,
        total_parameters=0,
        world_size=1,
    )
    assert path.read_bytes()[: len(items[0].content)] == items[0].content
    assert path.stat().st_size == layout.files[0].size_bytes


def lay_out_keys(*keys: Key, max_shard_bytes: int = 10**9) -> Layout:
    size = max(key.block_bytes for key in keys)
    holding = Holding(runs=Runs.of([(0, 0, 0, size)]), replicas=(0,), signature="")
    layout, _ = lay_out(
        KeyMap(sources=("s",), keys=keys),
        {"s": holding},
        source_dtypes=[torch.uint8],
        max_shard_bytes=max_shard_bytes,
        total_parameters=7,
        world_size=1,
    )
    return layout


@given(st.sets(NAMES, min_size=2, max_size=12))
def test_the_index_is_what_json_writes(names: set[str]) -> None:
    keys = [_key(name, (5,), torch.uint8, block, 5) for block, name in enumerate(sorted(names))]
    layout = lay_out_keys(*keys, max_shard_bytes=5)
    weight_map = {item.name: file.name for file in layout.files for item in file.items if item.name}
    assert sorted(weight_map) == sorted(names)
    metadata = {"total_parameters": 7, "total_size": 5 * len(names)}
    expected = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    assert layout.inline_files[0].content.decode() == expected


def test_a_header_that_safetensors_would_not_read_is_refused_and_one_that_it_reads_is_not() -> None:
    keys = [_key(f"{i:03}" + "n" * 999_900, (1,), torch.uint8, i, 1) for i in range(100)]
    layout = lay_out_keys(*keys)
    assert 99_990_000 < layout.files[0].items[0].length_bytes <= 100_000_008
    said = r"model\.safetensors: its header would have \d{9} bytes, more than the 100000000 .* a smaller max_shard_size"
    with pytest.raises(LayoutError, match=said):
        lay_out_keys(*keys, _key("one more" + "n" * 99_999, (1,), torch.uint8, 100, 1))


def test_every_dtype_that_torch_and_safetensors_share_has_a_name(tmp_path: Path) -> None:
    for dtype, name in SAFETENSORS_DTYPES.items():
        save_file({"t": torch.zeros(8, dtype=torch.uint8).view(dtype)}, tmp_path / "f.safetensors")
        content = (tmp_path / "f.safetensors").read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert header["t"]["dtype"] == name
