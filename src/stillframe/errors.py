"""Every exception that stillframe raises, as one tree.

    StillframeError
    ├── OptionError            an option or argument is illegal (also a ValueError)
    ├── ClosedError            the Checkpointer was closed
    ├── RunDirectoryError      the run directory is missing, not writable, or not shared by all ranks
    ├── LayoutError            this model cannot be laid out as files
    │   ├── UnsupportedModel     its save is not renames, slices and concatenations of its tensors
    │   ├── UnsupportedPlacement a tensor is distributed in a way that cannot be described exactly
    │   └── CoverageError        a byte of a file would be written by no rank, or by two
    ├── SaveFailed             a save did not become a checkpoint: step, rank, stage, path, reason
    │   ├── CheckpointExists     that step is already published, and overwriting was not asked for
    │   ├── InsufficientSpace    the file system cannot hold what would be written
    │   ├── WriteFailed          a writer process reported an error
    │   ├── WriterDied           a writer process ended without a receipt
    │   └── SaveTimeout          a bounded wait ran out; the message names the ranks that are late
    └── LoadError              a directory cannot be loaded
        ├── NotACheckpoint       it does not exist, or is no checkpoint
        ├── CorruptCheckpoint    truncated, overlapping, or contradicting itself; names file, key, offset
        └── ModelMismatch        keys, shapes or dtypes differ from the model's; all are listed at once

Nothing is swallowed: what goes wrong in a writer process, on another rank, or in a background thread
is raised on every rank at its next call on the training thread (`SaveFailed`), and by the save's future.
"""

from __future__ import annotations

from pathlib import Path


class StillframeError(Exception):
    """Base of all exceptions that stillframe raises on purpose."""


class OptionError(StillframeError, ValueError):
    """An option or argument is illegal; the message names it, its value and what is legal."""


class ClosedError(StillframeError):
    """The Checkpointer was closed; make a new one to save again."""


class RunDirectoryError(StillframeError):
    """The run directory is missing, not writable, or not the same file system on all ranks."""


class LayoutError(StillframeError):
    """The model cannot be laid out as the files of a checkpoint."""


class UnsupportedModel(LayoutError):
    """The model cannot be saved, or loaded, tensor by tensor; the message names the tensor and what to do."""


class UnsupportedPlacement(LayoutError):
    """A tensor is distributed over its mesh in a way that cannot be described exactly."""


class CoverageError(LayoutError):
    """A byte of a file would be written by no rank, or by more than one."""


class SaveFailed(StillframeError):
    """A save did not become a published checkpoint; what was published before is untouched.

    Attributes say where it failed: `step` (None: while the Checkpointer started or resumed), `rank` (the global rank
    that failed, None if no single one did), `stage` ("start", "resume", "preemption", "snapshot", "prepare",
    "write", "vote", "publish"; or, with the checkpoint published, "link" and "retention"), `path` (the final path of
    the checkpoint), `reason`.
    """

    def __init__(self, reason: str, *, step: int | None, rank: int | None, stage: str, path: Path) -> None:
        starting = "resume" if stage == "resume" else "start of the Checkpointer"
        what = starting if step is None else f"save of step {step}"
        where = "" if rank is None else f" on rank {rank}"
        super().__init__(f"{what} failed{where} in stage {stage!r} for {path}: {reason}")
        self.reason = reason
        self.step = step
        self.rank = rank
        self.stage = stage
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are otherwise rebuilt from their message alone, which fails in whatever process unpickles them.
        return _rebuilt, (type(self), self.reason, self.step, self.rank, self.stage, self.path)


def _rebuilt(
    cls: type[SaveFailed], reason: str, step: int | None, rank: int | None, stage: str, path: Path
) -> SaveFailed:
    return cls(reason, step=step, rank=rank, stage=stage, path=path)


class CheckpointExists(SaveFailed):
    """That step is already published, and overwriting was not asked for."""


class InsufficientSpace(SaveFailed):
    """The file system cannot hold what would be written; checked before anything is."""


class WriteFailed(SaveFailed):
    """A writer process reported an error, such as EIO or ENOSPC."""


class WriterDied(SaveFailed):
    """A writer process ended without leaving a receipt."""


class SaveTimeout(SaveFailed):
    """A bounded wait ran out; the reason names the ranks that are late and what was waited for."""


class LoadError(StillframeError):
    """A directory cannot be loaded."""


class NotACheckpoint(LoadError):
    """The directory does not exist or holds no weights in a format that stillframe reads."""


class CorruptCheckpoint(LoadError):
    """A file is truncated, overlaps itself, or contradicts the index; names file, key and offset."""


class ModelMismatch(LoadError):
    """Keys, shapes or dtypes differ from the model's; all differences are listed at once."""
