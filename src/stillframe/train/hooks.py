"""Hooks: a user's code at fixed points of a run, called on every rank, on the training thread."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stillframe.errors import OptionError

if TYPE_CHECKING:
    from stillframe.train.loop import Trainer


class Hook:
    """Base of all hooks: override what you need.

    Every rank calls the same hooks at the same step, so a hook may use collectives on the default process group. What
    a hook raises ends the training with that exception. `trainer` is there from `connect` on.
    """

    trainer: Trainer

    def connect(self, trainer: Trainer) -> None:
        """Called once, before the first step; in a run that resumes, after everything was put back."""
        self.trainer = trainer

    def after_train_step(self, step: int) -> None:
        """Called after each optimizer step, before anything is saved at it."""

    def after_hf_export(self, path: Path, step: int, epoch: int, total_step: int, total_epoch: int) -> None:
        """Called once the export of `step` is published at `path`, complete and durable, in the order of steps.

        An asynchronous export is published while later steps run: the call comes between two steps, as soon as every
        rank knows of it. `step` and `epoch` are those of the export.
        """

    def after_checkpoint(self, path: Path, step: int, epoch: int, total_step: int, total_epoch: int) -> None:
        """Called in the same way once the checkpoint of `step` is published at `path`."""

    def after_snapshot(self, path: Path, step: int, epoch: int, total_step: int, total_epoch: int) -> None:
        """Called in the same way once the snapshot of `step` is published at `path`; the next one replaces it."""


def load_hooks(names: Sequence[str]) -> list[Hook]:
    """Import and make the hooks of the configuration, `"module:name"` each; modules are found as `import` finds them.

    Raises `OptionError`: there is no such module or name, or it is no `Hook` class. What the module itself raises while
    it is imported is not caught.
    """
    hooks = []
    for name in names:
        module_name, _, class_name = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name and not module_name.startswith(f"{error.name}."):
                raise
            raise OptionError(f"hooks: no module {module_name!r}, named in {name!r}; is it on PYTHONPATH?") from error
        hook_class = getattr(module, class_name, None)
        if not (isinstance(hook_class, type) and issubclass(hook_class, Hook)):
            raise OptionError(f"hooks: {name!r} is no class derived from stillframe.train.hooks.Hook")
        hooks.append(hook_class())
    return hooks
