"""What the writers may take of a host, beside the training that they serve."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from stillframe.errors import OptionError

IoClass = Literal["best-effort", "idle"]

# What the save system of the XTuner trainer reads, for the slots of exports; the first that is set counts.
SLOT_VARIABLES = (
    "XTUNER_ASYNC_HF_FILE_WRITE_LOCK_SLOTS",
    "XTUNER_HF_SAVE_WRITER_SAVE_FILE_LOCK_SLOTS",
    "ASYNC_HF_FILE_WRITE_LOCK_SLOTS",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterLimits:
    """What each rank's writer process may take of its host. By default it takes what it can, and nobody waits.

    So a save is durable soonest. Training that needs the same cores is slower meanwhile; one that waits for a GPU is
    hardly so. Each limit makes saves longer, and what a crash costs with them. docs/exporting.md has figures.

    nice: added to the niceness of the writer, 0 to 19 (nice(2)). On busy cores 19 takes several times as long.
    io_class: "idle": the disk serves it when nobody else asks, where its scheduler knows classes (BFQ does; most
        others, and network file systems, know none). "best-effort": the kernel's default, whatever the trainer has.
        None: what the trainer has.
    export_slots, checkpoint_slots: how many writers of a host write at once, of exports and of checkpoints (snapshots,
        and both kinds as one), counted apart; the others wait for their turn, within `save_timeout_s`. All jobs of
        a user on the host count together. None: no limit.
    bytes_per_s_max: how many bytes a second a writer hands to the file system, on average over a save. None: no
        limit.

    A priority that the system refuses is logged, and the writer goes on without. Raises OptionError.
    """

    nice: int = 0
    io_class: IoClass | None = None
    export_slots: int | None = None
    checkpoint_slots: int | None = None
    bytes_per_s_max: float | None = None

    def __post_init__(self) -> None:
        if type(self.nice) is not int or not 0 <= self.nice <= 19:
            raise OptionError(f"WriterLimits: nice must be an integer from 0 to 19, not {self.nice!r}")
        if self.io_class is not None and self.io_class not in get_args(IoClass):
            raise OptionError(f"WriterLimits: io_class must be None, 'best-effort' or 'idle', not {self.io_class!r}")
        for name in ("export_slots", "checkpoint_slots"):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or not 1 <= count <= 1024):
                raise OptionError(f"WriterLimits: {name} must be None (no limit) or from 1 to 1024, not {count!r}")
        rate = self.bytes_per_s_max
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 1 <= rate < 2**60):
            raise OptionError(
                f"WriterLimits: bytes_per_s_max must be None (no limit) or a number of at least 1, not {rate!r}"
            )


def with_variables(limits: WriterLimits, environ: Mapping[str, str] = os.environ) -> WriterLimits:
    """`limits`, with the slots of exports that the environment asks for in XTuner's words, if they have none.

    Warns (FutureWarning) of a variable that is used, and of one that says nothing legal and is not.
    """
    name = next((name for name in SLOT_VARIABLES if environ.get(name, "").strip()), None)
    if name is None or limits.export_slots is not None:
        return limits
    text = environ[name].strip()
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
        warnings.warn(
            f"{name}={text!r} is ignored: it must be an integer from 1 to 1024; use WriterLimits(export_slots=...)",
            FutureWarning,
            stacklevel=3,
        )
        return limits
    warnings.warn(
        f"{name} is read for compatibility, and will not be for ever: use WriterLimits(export_slots={text})",
        FutureWarning,
        stacklevel=3,
    )
    return replace(limits, export_slots=int(text))
