"""The start from a published checkpoint: which one, agreed by all ranks, and everything put back.

rank 0: choose ─▶ open ─▶ read ─▶ vote ─▶ collect ─▶ verdict ─▶ put in place ─▶ vote ─▶ ...
others:     wait for open ─▶ read ─▶ vote ─▶ wait for the verdict ─▶ put in place ─▶ vote ─▶ ...

Either every rank has loaded the same checkpoint, or all raise what one of them found.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from stillframe.catalog.directory import RESUMABLE, checkpoint_dir, list_checkpoints
from stillframe.commit.failure import Failure
from stillframe.commit.rendezvous import Rendezvous
from stillframe.commit.vote import Ballot, Vote
from stillframe.durable import fsync_dir
from stillframe.errors import (
    CorruptCheckpoint,
    LoadError,
    ModelMismatch,
    NotACheckpoint,
    OptionError,
    StillframeError,
)
from stillframe.load.distcp import DistcpDirectory, open_distcp
from stillframe.load.folder import listed
from stillframe.load.local import local_part
from stillframe.manifest import read_manifest
from stillframe.names import CHECKPOINT_PART, TOGETHER, TRAIN_STATE_NAME, parse_published
from stillframe.resumable import Resumable, decode_train_state
from stillframe.state import rng
from stillframe.state.objects import RNG, choose_states, is_of_one_rank
from stillframe.state.restoring import OptimizerLoad, Targets, model_targets

_log = logging.getLogger("stillframe")
T = TypeVar("T")

OPTIMIZER = "optimizer"
OPTIMIZER_ARGUMENTS = "optimizer_arguments"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeChoice:
    """What `Checkpointer.resume` was asked for; its docstring says what each means."""

    run_dir: Path
    path: Path | None
    fallback: bool
    skip: frozenset[str]
    reset: frozenset[str]
    verify: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where a run goes on, the same on all ranks.

    `step` and `train_state` are those of the save; of a directory that stillframe did not write, None and empty.
    `world_size`: how many ranks saved it, None likewise. `left_as_they_are`: parts that could not be put back on this
    number of ranks (`reset` named them), or that the checkpoint does not have. `passed_over`: damaged directories that
    were newer; they have been renamed. `bytes_read` counts this rank's.
    """

    path: Path
    kind: str | None
    step: int | None
    train_state: Mapping[str, Any]
    world_size: int | None
    left_as_they_are: tuple[str, ...]
    passed_over: tuple[Path, ...]
    bytes_read: int


def resume(
    choice: ResumeChoice,
    resumable: Resumable,
    next_ballot: Callable[[int | None, Path], Ballot],
    meeting: Rendezvous,
    on_loaded: Callable[[Resumed, Sequence[Path]], None],
) -> Resumed | None:
    """Load what `choice` says into `resumable`, on every rank or on none; None if there is nothing to resume from.

    Once all ranks have loaded, rank 0 calls `on_loaded` with the damaged directories that were passed over; what that
    raises, all raise. Blocks until all ranks are done, bounded by the ballots' timeout. Raises LoadError or
    OptionError, as the rank did that failed.
    """
    _check_names(choice, resumable)
    damaged: list[Path] = []
    while True:
        ballot = next_ballot(None, choice.run_dir)
        path, is_last = None, True
        try:
            path, is_last = _agree_on_a_path(choice, len(damaged), ballot, meeting)
            if path is None:
                return None
            filled = _on_all_ranks(partial(_fill, path, choice, resumable, meeting), ballot, meeting, choice.run_dir)
            break
        except (CorruptCheckpoint, NotACheckpoint) as error:
            if path is None or is_last or not choice.fallback:
                raise
            _log.error("A DAMAGED CHECKPOINT IS PASSED OVER, and training goes back to an older one: %s", error)
            damaged.append(path)
        finally:
            ballot.acknowledge()
    # Optimizers and objects change only now, when every rank has read everything: a rank that falls back to an older
    # checkpoint must find them as they were.
    resumed = replace(filled.resumed, passed_over=tuple(map(published_dir, damaged)))
    ballot = next_ballot(None, choice.run_dir)
    try:
        if meeting.rank == 0:
            ballot.open(None)
        else:
            ballot.await_open()
        _on_all_ranks(
            partial(_put_back, filled, choice, resumable),
            ballot,
            meeting,
            choice.run_dir,
            lambda: on_loaded(resumed, damaged),
        )
    finally:
        ballot.acknowledge()
    return resumed


def _check_names(choice: ResumeChoice, resumable: Resumable) -> None:
    states = {RNG, *resumable.stateful}
    parts = states | {OPTIMIZER, OPTIMIZER_ARGUMENTS}
    for option, names, known in (("skip", choice.skip, parts), ("reset", choice.reset, states)):
        if unknown := sorted(names - known):
            raise OptionError(f"{option}: there is no part {unknown[0]!r}; parts are {', '.join(sorted(known))}")


def _candidates(choice: ResumeChoice) -> list[Path]:
    """The directories to try, in order; those after the first only where the caller falls back.

    What cannot be listed because its manifest is damaged comes first: nobody knows that it is not the newest.
    """
    if choice.path is not None:
        return [choice.path]
    listed = list_checkpoints(choice.run_dir, *RESUMABLE)
    newest = listed[-1] if listed else None
    # Later steps of a branch that was left are no older ones to fall back to.
    older = [e for e in listed if newest and (e.branch == newest.branch or e.step <= newest.step)]
    return [*_unlisted(choice.run_dir, {entry.path for entry in listed}), *map(checkpoint_dir, reversed(older))]


def _unlisted(run_dir: Path, listed: Collection[Path]) -> list[Path]:
    """Directories whose manifest is damaged, though their names are those of checkpoints; highest step first.

    One without a manifest is somebody else's: other trainers call theirs `checkpoint-<step>` too. One with a good
    manifest of another step is a copy that somebody renamed; it is left alone, and so are links.
    """
    found = []
    for path in run_dir.iterdir():
        parsed = parse_published(path.name)
        if parsed is None or parsed[0] not in RESUMABLE or path in listed or path.is_symlink():
            continue
        try:
            read_manifest(path)
        except NotACheckpoint:
            continue
        except LoadError:
            found.append((parsed[1], path / CHECKPOINT_PART if parsed[0] == TOGETHER else path))
        else:
            _log.warning("%s has the manifest of another checkpoint and is passed over; resume(path) takes it", path)
    return [path for _, path in sorted(found, reverse=True)]


def _agree_on_a_path(choice: ResumeChoice, tried: int, ballot: Ballot, meeting: Rendezvous) -> tuple[Path | None, bool]:
    """The directory that rank 0 chooses, having `tried` some, and whether it is the last; None if there is none."""
    if meeting.rank != 0:
        told = json.loads(ballot.await_open() or "{}")
        return (Path(told["path"]) if told["path"] else None), told["is_last"]
    try:
        candidates = _candidates(choice)[tried:]
    except Exception as error:
        ballot.open(Failure.of(error, rank=0, stage="resume"))
        raise
    path, is_last = (candidates[0] if candidates else None), len(candidates) < 2
    ballot.open(None, note=json.dumps({"path": None if path is None else str(path), "is_last": is_last}))
    return path, is_last


def _on_all_ranks(
    work: Callable[[], T],
    ballot: Ballot,
    meeting: Rendezvous,
    run_dir: Path,
    then: Callable[[], None] = lambda: None,
) -> T:
    """The result of this rank's `work`, once all ranks could do theirs; what fails on one is raised on all.

    Rank 0 does what comes `then` in between, and what that raises, all raise.
    """
    own_error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001  # told to all ranks, and raised below
        own_error = error
    failure = None if own_error is None else Failure.of(own_error, rank=meeting.rank, stage="resume")
    try:
        ballot.cast(Vote(rank=meeting.rank, step=None, layout_digest="", failure=failure))
        if meeting.rank == 0:
            _decide(ballot, run_dir, then)
        else:
            ballot.await_verdict()
    except StillframeError as verdict:
        # On the rank where it failed, the original says more than what came back from the vote.
        if isinstance(own_error, StillframeError) and str(verdict).endswith(str(own_error)):
            raise own_error from None
        raise verdict from own_error
    return cast(T, result)  # a rank that has none has voted so


def _decide(ballot: Ballot, run_dir: Path, then: Callable[[], None]) -> None:
    try:
        ballot.collect()
        then()
    except Exception as error:
        failure = Failure.of(error, rank=0, stage="resume")
        ballot.decide(failure)
        raise failure.exception(step=None, path=run_dir) from error
    ballot.decide(None)


def branch_of(run_dir: Path, resumed_from: Path | None, damaged: Sequence[Path] = ()) -> str:
    """The branch that a launch goes on with: that of the newest, unless it resumes from something else.

    `resumed_from` None: nothing is resumed. `damaged` were passed over, and do not count.
    """
    entries = [entry for entry in list_checkpoints(run_dir) if entry.path not in map(published_dir, damaged)]
    if not entries:
        return ""
    if resumed_from is None:
        return entries[-1].branch
    newest = next((entry for entry in reversed(entries) if entry.kind != "hf"), None)
    if newest is not None and checkpoint_dir(newest).resolve() == resumed_from.resolve():
        return newest.branch
    return secrets.token_hex(4)


def set_aside(damaged: Sequence[Path], attempt: str) -> None:
    """Give damaged checkpoints names that are nobody's, so that their steps can be saved again; nothing is deleted."""
    for path in map(published_dir, damaged):
        aside = path.with_name(f"{path.name}.damaged-{attempt}")
        path.rename(aside)
        fsync_dir(path.parent)
        _log.error("the damaged %s is set aside as %s; delete it once you need nothing from it", path, aside)


def published_dir(checkpoint_path: Path) -> Path:
    """The published directory that a DCP directory is or lies in."""
    return checkpoint_path if parse_published(checkpoint_path.name) is not None else checkpoint_path.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filled:
    """What one rank has read: the model's tensors are filled, everything else waits for `_put_back`."""

    resumed: Resumed
    optimizers: OptimizerLoad | None
    objects: Mapping[str, object]
    states: Mapping[str, Any]


def _fill(path: Path, choice: ResumeChoice, resumable: Resumable, meeting: Rendezvous) -> _Filled:
    """Compare everything, then read it; of what there is already, only the model's tensors change."""
    with open_distcp(path) as directory:
        states, left = _rank_states(directory, choice, resumable, meeting)
        train_state = {}
        if directory.manifest is not None:
            train_state = decode_train_state(directory.read_checked(TRAIN_STATE_NAME), path / TRAIN_STATE_NAME)
        of_others = resumable.keys_of_others
        model = model_targets(
            resumable.model,
            directory.tensors,
            directory.paths,
            save_frozen=resumable.save_frozen,
            of_others=of_others,
        )
        optimizers = None
        objects: dict[str, object] = {}
        wanted = [model]
        if resumable.optimizers and OPTIMIZER not in choice.skip:
            objects = {k: directory.object(k) for k in sorted(directory.objects) if directory.paths[k][0] == OPTIMIZER}
            optimizers = OptimizerLoad(
                resumable.model, resumable.optimizers, directory.tensors, directory.paths, of_others=of_others
            )
            wanted.append(optimizers.targets)
        elif OPTIMIZER not in choice.skip and any(p[0] == OPTIMIZER for p in directory.paths.values()):
            left = (*left, OPTIMIZER)
            _log.warning("%s has an optimizer's state, and this Checkpointer was made without optimizer=", path)
        targets = {key: tensor for part in wanted for key, tensor in part.tensors.items()}
        _refuse_differences(directory, targets, wanted)
        if optimizers is not None:
            optimizers.refuse_other_groups(objects, arguments=OPTIMIZER_ARGUMENTS not in choice.skip)
        _refuse_untied(directory, model)
        bytes_read = directory.fill(targets, verify=choice.verify, partial=True)
        manifest = directory.manifest
    resumed = Resumed(
        path=path,
        kind=None if manifest is None else manifest.kind,
        step=None if manifest is None else manifest.step,
        train_state=train_state,
        world_size=None if manifest is None else manifest.world_size,
        left_as_they_are=left,
        passed_over=(),
        bytes_read=bytes_read,
    )
    return _Filled(resumed=resumed, optimizers=optimizers, objects=objects, states=states)


def _put_back(filled: _Filled, choice: ResumeChoice, resumable: Resumable) -> None:
    """Optimizers, objects, and last the random state, which the others may use."""
    if filled.optimizers is not None:
        filled.optimizers.put_in_place(filled.objects, arguments=OPTIMIZER_ARGUMENTS not in choice.skip)
    for name, state in filled.states.items():
        if name != RNG:
            _put_back_one(name, resumable.stateful[name], state)
    if RNG in filled.states:
        rng.restore(filled.states[RNG])


def _refuse_untied(directory: DistcpDirectory, model: Targets) -> None:
    """Raise ModelMismatch where tensors that are one in the model have different values in the checkpoint."""
    for other, key in model.same_as.items():
        if directory.tensors[other] == directory.tensors[key]:
            continue  # written once, under both names
        one, two = (torch.empty_like(model.tensors[key], requires_grad=False) for _ in range(2))
        if not directory.differences({other: two}, partial=True):
            directory.fill({key: one, other: two}, partial=True)
            if torch.equal(local_part(one), local_part(two)):
                continue
        raise ModelMismatch(
            f"{directory.path}: {key} and {other} are one tensor in the model but differ in the checkpoint; the model "
            "that was saved did not tie them"
        )


def _refuse_differences(
    directory: DistcpDirectory, targets: Mapping[str, torch.Tensor], wanted: Sequence[Targets]
) -> None:
    """Raise ModelMismatch with everything that the checkpoint lacks, has too much, or has in another form."""
    missing = [key for part in wanted for key in part.missing]
    unexpected = [key for part in wanted for key in part.unexpected]
    found = []
    if missing:
        found.append(f"{len(missing)} tensors are not in the checkpoint: {listed(missing)}")
    if unexpected:
        found.append(f"{len(unexpected)} tensors of the checkpoint have no place: {listed(unexpected)}")
    if unfit := directory.differences(targets, partial=True):
        found.append(unfit)
    if found:
        raise ModelMismatch(
            f"{directory.path} is the checkpoint of another model or optimizer, nothing was loaded: {'; '.join(found)}"
        )


def _rank_states(
    directory: DistcpDirectory, choice: ResumeChoice, resumable: Resumable, meeting: Rendezvous
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The states for this rank, by name, and the names of those that stay as they are."""
    names = sorted({RNG, *resumable.stateful} - choice.skip)
    manifest = directory.manifest
    if manifest is None:
        return {}, tuple(names)
    same = manifest.world_size == meeting.world_size
    of_ranks = [
        directory.rank_state(rank) if not same or rank == meeting.rank else {} for rank in range(manifest.world_size)
    ]
    own = {name for name in names if name == RNG or is_of_one_rank(name, resumable.stateful[name])}
    states, left = choose_states(
        of_ranks, rank=meeting.rank, world_size=meeting.world_size, names=names, own=own, reset=choice.reset
    )
    unknown = sorted(of_ranks[0 if not same else meeting.rank].keys() - set(names) - choice.skip - {RNG})
    if unknown:
        left = (*left, *unknown)
        _log.warning("%s has the state of %s, which this Checkpointer was made without", directory.path, unknown)
    absent = [name for name in names if name not in states and name not in left]
    if absent:
        raise ModelMismatch(
            f"{directory.path}: has no state of {', '.join(absent)}; it was saved without. Pass skip={tuple(absent)!r} "
            "to go on with what they have now"
        )
    return states, left


def _put_back_one(name: str, stateful: Any, state: Any) -> None:
    try:
        stateful.load_state_dict(state)
    except Exception as error:
        raise ModelMismatch(
            f"{name} ({type(stateful).__name__}) does not take its saved state back: {type(error).__name__}: {error}"
        ) from error
