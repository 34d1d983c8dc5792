"""The random state of a CUDA device is a part of what a checkpoint keeps."""

from __future__ import annotations

import io

import pytest
import torch

from stillframe.state import rng


@pytest.mark.gpu
def test_a_cuda_generator_goes_on_where_it_was() -> None:
    torch.randn(3, device="cuda")  # the state is kept of a device that is in use
    stream = io.BytesIO()
    torch.save(rng.capture(), stream)
    expected = [torch.randn(5, device="cuda"), torch.randn(5)]
    torch.randn(7, device="cuda")
    stream.seek(0)
    rng.restore(torch.load(stream, weights_only=True))
    assert all(torch.equal(torch.randn_like(values), values) for values in expected)
