"""The server that launched processes are forked from: multiprocessing's, with the slow imports done once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from stillframe.testing import rank_process

_PRELOADED = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers",
    "stillframe.testing.warm",
)
# Threads do not survive a fork, so the server must start none. And it must ask NVML for devices, not CUDA: a driver
# that was initialised before a fork cannot be used after it.
_ENVIRON = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedProcess:
    """A process, and the launcher's ends of its two connections; `lifeline` closing kills it."""

    process: BaseProcess
    control: Connection
    lifeline: Connection


def start_process(spec: rank_process.ProcessSpec) -> StartedProcess:
    """Start the process that `spec` describes.

    Starts the server first if it does not run, which takes some seconds; it ends when the calling process does.
    """
    _ensure_server()
    control, far_control = _context.Pipe()
    far_lifeline, lifeline = _context.Pipe(duplex=False)
    with far_control, far_lifeline:
        process = _context.Process(
            target=rank_process.main, args=(spec, far_control, far_lifeline), name=f"rank {spec.rank}", daemon=False
        )
        process.start()
    return StartedProcess(process=process, control=control, lifeline=lifeline)


def _ensure_server() -> None:
    # Each process imports the caller's main module again (multiprocessing does that), and the function's module: under
    # pytest these import the following, unless the server has them already.
    test_tools = [name for name in ("pytest", "hypothesis") if name in sys.modules]
    _context.set_forkserver_preload([*_PRELOADED, *test_tools])
    before = {name: os.environ.get(name) for name in _ENVIRON}
    os.environ.update(_ENVIRON)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
