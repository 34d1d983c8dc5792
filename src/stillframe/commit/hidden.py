"""The directory of an attempt before it has its final name, and the way there: sealed, claimed, renamed."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from stillframe import durable, names
from stillframe.errors import CheckpointExists, LoadError, SaveFailed
from stillframe.manifest import Manifest, encode_manifest, read_manifest

_log = logging.getLogger("stillframe")


class HiddenDirectory:
    """A hidden directory, held open once it was made or opened: whatever has its path now, this is it.

    A rank 0 that was stopped for long may find that another job has retired its directory and made one of its own
    under the same name, which it must not touch.
    """

    def __init__(self, run_dir: Path, *, kind: str, step: int) -> None:
        self.path = names.incomplete_path(run_dir, kind, step)
        self.final_dir = names.published_path(run_dir, kind, step)
        self._run_dir = run_dir
        self._kind = kind
        self._step = step
        self._fd = -1
        self._published = False

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    @property
    def inside(self) -> Path:
        """The directory by its descriptor."""
        return Path(f"/proc/self/fd/{self._fd}")

    def make(self, attempt: str, layout_digest: str) -> None:
        """Make it, empty but for the attempt's marker; durable on return. Its name must be free."""
        self.path.mkdir()
        self.open(self.path)
        (self.inside / names.WORK_DIR_NAME).mkdir()
        durable.write_file(self.inside / names.marker_name(attempt), layout_digest.encode())
        durable.fsync_dir(self.inside / names.WORK_DIR_NAME)
        durable.fsync_dir(self.inside)
        durable.fsync_dir(self._run_dir)

    def open(self, path: Path) -> None:
        """Take the directory that is at `path`. Raises OSError, also for a link."""
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.path = path

    def put_in_place(self, held_back: Iterable[str]) -> None:
        """Move the files that were held back to their places, but for those that are there already; durable on return.

        A process that ended in the middle of this, or right after, has left nothing that a second time does not mend.
        """
        parents = set()
        for name in held_back:
            staged, placed = self.inside / names.staged_name(name), self.inside / name
            placed.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(staged):
                staged.rename(placed)
            parents |= {self.inside / parent for parent in Path(name).parents}
        for parent in sorted(parents, key=lambda path: -len(path.parts)):
            durable.fsync_dir(parent)

    def seal(self, manifest: Manifest) -> None:
        """Write the manifest, then remove the work directory; durable on return. What it says must be proven."""
        durable.write_file(self.inside / names.MANIFEST_NAME, encode_manifest(manifest))
        # The manifest proves what the receipts proved; it must be durable before they go.
        durable.fsync_dir(self.inside)
        durable.remove_tree(self.inside / names.WORK_DIR_NAME)
        durable.fsync_dir(self.inside)

    def publish(self, attempt: str, *, overwrite: bool) -> None:
        """Give it its final name; published and durable on return. It must be sealed.

        Raises CheckpointExists or SaveFailed, with nothing published, if the name is taken or another job took over.
        """
        self.refuse_existing(overwrite=overwrite)
        self._claim(names.complete_path(self._run_dir, self._kind, self._step, attempt))
        if overwrite and os.path.lexists(self.final_dir):
            durable.exchange(self.path, self.final_dir)  # the hidden name now holds what was replaced
        else:
            durable.publish(self.path, self.final_dir)
        self._published = True

    def refuse_existing(self, *, overwrite: bool) -> None:
        """Raise CheckpointExists if the final name is taken; to `overwrite`, only if by no checkpoint of that step."""
        if not os.path.lexists(self.final_dir):
            return
        if not overwrite:
            raise self.failed(CheckpointExists, "it exists already; pass overwrite=True to replace it", "prepare")
        try:
            manifest = read_manifest(self.final_dir)
        except LoadError as error:
            self._refuse_foreign(str(error), error)
        else:
            if self.final_dir.is_symlink():
                self._refuse_foreign("it is a symbolic link", None)
            if (manifest.kind, manifest.step) != (self._kind, self._step):
                self._refuse_foreign(f"its manifest is that of {manifest.kind} step {manifest.step}", None)

    def _refuse_foreign(self, why: str, cause: LoadError | None) -> NoReturn:
        reason = f"it exists and is not a checkpoint of stillframe of that step ({why}); move it away"
        raise self.failed(CheckpointExists, reason, "prepare") from cause

    def _claim(self, own: Path) -> None:
        """Move it to a name that only its attempt uses, so that what is renamed next is surely this directory."""
        shared = self.path
        if self._is_at(shared):
            shared.rename(own)
            if self._is_at(own):
                self.path = own
                return
            own.rename(shared)  # it changed hands between the look and the rename
        reason = "another job saves this step in the same run directory and has taken over; give each job its own"
        raise self.failed(SaveFailed, reason, "publish")

    def _is_at(self, path: Path) -> bool:
        try:
            found, own = path.lstat(), os.fstat(self._fd)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)

    def clean_up(self, attempt: str) -> None:
        """Remove what the attempt leaves: after `publish` the version that was replaced, else what was written."""
        try:
            if self._is_at(self.path) or (self._published and os.path.lexists(self.path)):
                durable.retire(self.path, names.retired_path(self._run_dir, self._kind, self._step, attempt))
        finally:
            self.close()

    def retire(self) -> None:
        """Free its path of what an ended attempt has left there. Raises OSError if the path cannot be freed.

        A writer of a killed run may still be at work in there: its files go with the renamed directory, and the
        marker of the next attempt tells it that the new directory of this name is not its own.
        """
        if not os.path.lexists(self.path):
            return
        retired = names.retired_path(self._run_dir, self._kind, self._step, f"{secrets.token_hex(8)}.0")
        try:
            durable.retire(self.path, retired)
        except OSError as error:
            if os.path.lexists(self.path):
                raise
            # That writer made another file just now, for example. It is no reason to go without this checkpoint.
            _log.warning("what an earlier attempt left cannot be removed, and stays as %s: %s", retired, error)

    def failed(self, cls: type[SaveFailed], reason: str, stage: str, *, rank: int = 0) -> SaveFailed:
        return cls(reason, step=self._step, rank=rank, stage=stage, path=self.final_dir)
