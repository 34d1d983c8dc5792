"""stillframe: asynchronous, crash-safe checkpoints for distributed PyTorch training.

The names below are loaded on first use, so that the writer process, which imports this package, stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillframe.checkpointer import Checkpointer
    from stillframe.limits import WriterLimits
    from stillframe.load.huggingface import load_hf
    from stillframe.load.verifying import verify
    from stillframe.preemption import Preemption

    __version__: str

__all__ = ["Checkpointer", "Preemption", "WriterLimits", "__version__", "load_hf", "verify"]

_HOMES = {
    "Checkpointer": "stillframe.checkpointer",
    "Preemption": "stillframe.preemption",
    "WriterLimits": "stillframe.limits",
    "load_hf": "stillframe.load.huggingface",
    "verify": "stillframe.load.verifying",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # it takes longer to import than all else that a writer needs of us

        return version("stillframe")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stillframe' has no attribute {name!r}")
