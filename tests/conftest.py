"""Settings that hold for every test, and for the processes that tests start."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest
import torch

# Nothing is downloaded. Read when huggingface_hub is imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
# The tokenizers library warns when a process that used its threads forks; no test needs them.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# How long an example takes depends on the machine; no test's outcome may.
hypothesis.settings.register_profile("stillframe", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("stillframe")


def pytest_configure() -> None:
    """A run that is told to end (`timeout`, CI) ends as by Ctrl-C, so that ranks and temporary folders end with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
