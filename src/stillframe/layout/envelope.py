"""What `torch.save` writes around the bytes of a tensor: found without the tensor, so that only its bytes are copied.

`torch.save` of a tensor is a zip file with the pickled description of the tensor, its bytes as one record without
compression, and the zip's directory (torch 2.13 `serialization.py`, `_save`). Under `torch.serialization.skip_data` it
seeks over the bytes instead of writing them, and saves a tensor that has no memory at all (a FakeTensor) like one that
has. The record's CRC32 is then written as 0; `torch.load` does not look at it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.serialization import config

from stillframe.errors import UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEnvelope:
    """`prefix` + the tensor's `payload_bytes` bytes, row-major + `suffix` is a file that `torch.load` reads."""

    prefix: bytes
    payload_bytes: int
    suffix: bytes

    @property
    def total_bytes(self) -> int:
        return len(self.prefix) + self.payload_bytes + len(self.suffix)


@lru_cache(maxsize=1 << 16)
def envelope(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorEnvelope:
    """The envelope of a contiguous CPU tensor that requires no gradient; some 1.5 KB, for any size of the tensor.

    Takes no memory for the tensor. The same on every machine with the same version of torch, whatever the options that
    are set for `torch.save`. Raises UnsupportedModel for a dtype that `torch.save` cannot save.
    """
    sink = _Sink()
    # The options are part of what is written; these are torch's defaults.
    with (
        config.patch({"save.compute_crc32": True, "save.storage_alignment": 64}),  # type: ignore[attr-defined]
        torch.inference_mode(False),
    ):
        try:
            with FakeTensorMode():
                tensor = torch.empty(shape, dtype=dtype, device="cpu", requires_grad=False)
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(tensor, cast(IO[bytes], sink))
        except (KeyError, RuntimeError, NotImplementedError) as error:
            raise UnsupportedModel(f"torch.save cannot save a tensor of dtype {dtype}: {error}") from error
    return sink.envelope()


class _Sink(io.RawIOBase):
    """A file that keeps what is written before and after the one place that is skipped, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self._parts = [bytearray()]
        self._skipped_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        self._parts[-1] += data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_CUR, "torch.save skips forward over what it does not write"
        assert len(self._parts) == 1, "a tensor has one storage"
        self._parts.append(bytearray())
        self._skipped_bytes = offset
        return len(self._parts[0]) + offset

    def envelope(self) -> TensorEnvelope:
        prefix, *rest = (bytes(part) for part in self._parts)
        return TensorEnvelope(prefix=prefix, payload_bytes=self._skipped_bytes, suffix=b"".join(rest))
