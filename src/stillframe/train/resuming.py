"""The start of a run from what an earlier one saved: whether it may start, from where, and what is put back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stillframe.catalog.directory import list_checkpoints
from stillframe.checkpointer import Checkpointer
from stillframe.errors import OptionError
from stillframe.resume import Resumed
from stillframe.train import parallel
from stillframe.train.config import ResumeConfig, as_record
from stillframe.train.progress import Progress, ResumeMetrics
from stillframe.train.state import TrainState, changes

if TYPE_CHECKING:
    from stillframe.train.loop import Trainer

ALWAYS_OURS = ("optimizer_arguments",)
"""What no checkpoint decides: learning rate, betas and weight decay are those of the configuration."""

_HIDDEN = (".checkpoint-", ".snapshot-", ".step-")
"""How the names begin under which a run that was cut off may have left a checkpoint that the start publishes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """What a run goes on from. `lacks_export`: nothing was exported at its step or later, be it that none was due."""

    metrics: ResumeMetrics
    changes: tuple[str, ...]
    lacks_export: bool

    def tell(self, progress: Progress) -> None:
        progress.resume(self.metrics)
        if "rng" in self.metrics.begun_anew and self.metrics.saved_world_size != self.metrics.world_size:
            progress.say(
                f"the random states of {self.metrics.saved_world_size} ranks cannot be those of "
                f"{self.metrics.world_size}: each draws new numbers from here on"
            )
        for change in self.changes:
            progress.say(f"the configuration changed: {change}")


def require_startable(run_dir: Path, resume: ResumeConfig) -> None:
    """Refuse a directory with checkpoints of an earlier run that this one is not to go on from, or cannot.

    Lets one pass in which a checkpoint may yet appear, when the Checkpointer starts; to be asked again after that.
    """
    if resume.from_dir is not None and not Path(resume.from_dir).is_dir():
        raise OptionError(f"resume.from = {resume.from_dir!r}: no such directory")
    if not run_dir.is_dir():
        return
    entries = list_checkpoints(run_dir)
    if not entries:
        return
    what = f"run_dir = {str(run_dir)!r}: holds {len(entries)} checkpoints of an earlier run, {entries[-1].path.name} "
    if not resume.auto:
        raise OptionError(f"{what}the latest, and resume.auto is false; choose a fresh run_dir, or let it be resumed")
    may_resume = any(entry.kind != "hf" for entry in entries) or resume.from_dir is not None
    if not may_resume and not any(path.name.startswith(_HIDDEN) for path in run_dir.iterdir()):
        raise OptionError(
            f"{what}the latest, and none to resume from; choose a fresh run_dir (to go on from that model, name it as "
            "model.path)"
        )


def recovered(checkpointer: Checkpointer) -> tuple[str, ...]:
    """What the start made of saves that had been cut off, a line each."""
    return tuple(f"{found.path.name} is {found.action}: {found.reason}" for found in checkpointer.recovered)


def resume(trainer: Trainer) -> Resumption | None:
    """Put back what the newest checkpoint or snapshot of the run directory holds, else the one of `resume.from`.

    None if there is neither: the run is a new one. Collective. Raises OptionError for a run directory that cannot be
    used and for data other than the checkpoint's, LoadError for a checkpoint that is damaged or does not fit.
    """
    config = trainer.config.resume
    require_startable(trainer.run_dir, config)
    resumed: Resumed | None = None
    if config.auto:
        resumed = trainer.checkpointer.resume(fallback=config.fallback, skip=ALWAYS_OURS, reset=("rng",))
    if config.from_dir is not None and resumed is not None:
        _refuse_older_of_this_run(trainer.run_dir, Path(config.from_dir), resumed.path)
    if resumed is not None:
        return _resumption(trainer, resumed, ())
    require_startable(trainer.run_dir, config)  # what was hidden is published now, or gone
    if config.from_dir is None:
        return None
    parts = {"optimizer": config.load_optimizer, "dataloader": config.load_dataset, "rng": config.load_rng}
    skipped = tuple(name for name, is_loaded in parts.items() if not is_loaded)
    resumed = trainer.checkpointer.resume(config.from_dir, skip=(*skipped, *ALWAYS_OURS), reset=("rng",))
    assert resumed is not None, "a directory that was named is loaded, or an error"
    return _resumption(trainer, resumed, skipped if config.load_schedule else (*skipped, "schedule"))


def _refuse_older_of_this_run(run_dir: Path, from_dir: Path, newest_dir: Path) -> None:
    """A branch that starts within the run directory would overwrite the checkpoints that come after."""
    from_dir, newest_dir = from_dir.resolve(), newest_dir.resolve()
    if run_dir.resolve() in from_dir.parents and from_dir != newest_dir and from_dir not in newest_dir.parents:
        raise OptionError(
            f"resume.from = {str(from_dir)!r}: lies in this run_dir, which goes on from {newest_dir.name}. To branch "
            "off from the older one, choose a new run_dir; the later ones of this run are left alone then"
        )


def _resumption(trainer: Trainer, resumed: Resumed, anew: tuple[str, ...]) -> Resumption:
    """Count on from the checkpoint, which is loaded, but for the parts that are to begin `anew`."""
    config = trainer.config
    if resumed.world_size != trainer.ranks.world_size:
        anew = (*anew, "rng")  # also where one rank's state was loaded by all, which would now draw alike
    anew = tuple(sorted({*anew, *resumed.left_as_they_are}))
    state = TrainState.from_record(resumed.train_state, path=str(resumed.path))
    trainer.load_state(state)
    if "schedule" in anew:
        trainer.schedule_begin = state.step
    if "rng" in anew:
        parallel.seed_own_numbers(trainer.ranks, seed=config.seed, step=state.step)
    exports = [entry.step for entry in list_checkpoints(trainer.run_dir) if entry.kind in ("hf", "step")]
    return Resumption(
        metrics=ResumeMetrics(
            step=state.step,
            epoch=state.epoch,
            path=str(resumed.path),
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            train_time_s=state.train_time_s,
            saved_world_size=resumed.world_size,
            world_size=trainer.ranks.world_size,
            recovered=recovered(trainer.checkpointer),
            begun_anew=anew,
        ),
        changes=tuple(changes(state.config, as_record(config))),
        lacks_export=not any(step >= state.step for step in exports),
    )
