"""Envelopes against what `torch.save` itself writes."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.serialization import config

from stillframe.errors import UnsupportedModel
from stillframe.layout.envelope import envelope

# Where a tensor of these has no elements of its own size (4 bits, 1 to 7 bits) or a scale beside it (quantized).
NOT_SAVED = {
    dtype
    for name in dir(torch)
    if isinstance(dtype := getattr(torch, name), torch.dtype)
    and (str(dtype).startswith("torch.q") or any(f"int{bits}" == name.removeprefix("u") for bits in range(1, 8)))
} | {torch.bit, torch.quint4x2, torch.quint2x4, torch.bits1x8, torch.bits2x4, torch.bits4x2, torch.bits8, torch.bits16}
DTYPES = sorted(
    {dtype for name in dir(torch) if isinstance(dtype := getattr(torch, name), torch.dtype)} - NOT_SAVED, key=str
)
SHAPES = [(), (0,), (1,), (7,), (2, 0, 3), (3, 5), (1, 64), (2, 3, 4, 5), (300, 7)]


def saved(tensor: torch.Tensor) -> bytes:
    sink = io.BytesIO()
    torch.save(tensor, sink)
    return sink.getvalue()


def saved_without_data(tensor: torch.Tensor) -> bytes:
    """What torch.save writes with the bytes left out, as zeros."""
    sink = io.BytesIO()
    with torch.serialization.skip_data():
        torch.save(tensor, sink)
    return sink.getvalue()


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental", UserWarning)
        numbers = torch.arange(math.prod(shape) * dtype.itemsize).remainder(2 if dtype == torch.bool else 251)
        return numbers.to(torch.uint8).view(-1, dtype.itemsize).view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefix_payload_and_suffix_are_what_torch_saves_and_loads(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensor, found = values(dtype, shape), envelope(dtype, shape)
        payload = raw(tensor)
        assert found.payload_bytes == len(payload)
        assert found.prefix + bytes(len(payload)) + found.suffix == saved_without_data(tensor)
        assert found.total_bytes == len(saved(tensor))
        blob = found.prefix + payload + found.suffix
        loaded = torch.load(io.BytesIO(blob), weights_only=True)
        assert (loaded.dtype, loaded.shape, loaded.stride()) == (dtype, tensor.shape, tensor.stride())
        assert (loaded.requires_grad, loaded.storage_offset()) == (False, 0)
        assert raw(loaded) == payload
        if payload:
            assert len(found.prefix) % 64 == 0


def test_the_payload_lies_where_torch_puts_it() -> None:
    tensor = values(torch.float32, (3, 5))
    found = envelope(torch.float32, (3, 5))
    assert saved(tensor)[len(found.prefix) :][: found.payload_bytes] == raw(tensor)


def test_a_tensor_of_many_gigabytes_takes_no_memory_and_is_read_back(tmp_path: Path) -> None:
    rows = (5 << 30) // 8  # beyond 4 GiB, the zip's entries are of another form (zip64)
    found = envelope(torch.float32, (rows, 2))
    assert found.payload_bytes == 5 << 30
    path = tmp_path / "sparse.pt"
    with path.open("wb") as file:
        file.write(found.prefix)
        file.seek(found.payload_bytes - 4, io.SEEK_CUR)
        file.write(torch.tensor(1.5).numpy().tobytes())
        file.write(found.suffix)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded.shape == (rows, 2)
    assert loaded[-1].tolist() == [0.0, 1.5]
    assert envelope(torch.uint8, (1 << 50,)).payload_bytes == 1 << 50


def test_the_options_of_torch_save_and_the_mode_of_the_caller_make_no_difference() -> None:
    expected = envelope.__wrapped__(torch.float32, (4, 4))
    with config.patch({"save.compute_crc32": False, "save.storage_alignment": 4096}), torch.inference_mode():
        assert envelope.__wrapped__(torch.float32, (4, 4)) == expected
        assert config.save.storage_alignment == 4096
    with torch.device("meta"):
        assert envelope.__wrapped__(torch.float32, (4, 4)) == expected


def test_equal_tensors_share_one_envelope() -> None:
    assert envelope(torch.int64, (3,)) is envelope(torch.int64, (3,))


@pytest.mark.parametrize("dtype", [torch.int4, torch.qint8], ids=str)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_dtype_that_cannot_be_saved_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModel, match=rf"cannot save a tensor of dtype {dtype}"):
        envelope(dtype, (4,))
