"""What only one rank has: objects with `state_dict` and `load_state_dict`, and the random state, as one small file."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from stillframe.errors import ModelMismatch, OptionError
from stillframe.state import rng

RNG = "rng"


@runtime_checkable
class Stateful(Protocol):
    """Anything that says its state and takes it back: a learning rate scheduler, a dataloader, a sampler, a meter.

    A state is made of numbers, text, bytes, tensors, lists, tuples and dicts: it is read with
    `torch.load(weights_only=True)`, which executes nothing.
    """

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def check_stateful(objects: Mapping[str, object]) -> dict[str, Stateful]:
    """`objects` as they are; raises OptionError for one without the two methods, or with a name that is taken."""
    checked = {}
    for name, value in objects.items():
        if not isinstance(name, str) or not name or name == RNG:
            raise OptionError(f"stateful: {name!r} is no name, or is taken; {RNG!r} is the random state's")
        if not isinstance(value, Stateful):
            raise OptionError(
                f"stateful: {name!r} is a {type(value).__name__} without state_dict() and load_state_dict(state); "
                "give it both, or save its values in train_state"
            )
        checked[name] = value
    return checked


def render_rank_state(objects: Mapping[str, Stateful]) -> bytes:
    """This rank's states and random state, now, as `torch.save` writes them.

    Raises OptionError, naming the object, for a state that could not be read back without executing code.
    """
    buffer = io.BytesIO()
    states = {name: value.state_dict() for name, value in objects.items()}
    torch.save({RNG: rng.capture(), **states}, buffer)
    content = buffer.getvalue()
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except pickle.UnpicklingError:
        for name, state in states.items():
            _refuse_unsafe(name, state)
        raise
    return content


def _refuse_unsafe(name: str, state: object) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        told = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        reason = told.partition(" Please use")[0].rpartition("Error: ")[2]
        raise OptionError(
            f"the state of {name!r} holds more than numbers, text, tensors, lists and dicts, so that it could not be "
            f"read back without executing code: {reason.strip()[:300]}"
        ) from error


def choose_states(
    of_ranks: Sequence[Mapping[str, Any]], *, rank: int, world_size: int, names: Collection[str], reset: Collection[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Of the states that the ranks of a checkpoint left, those for this rank, and the names that have none for it.

    With as many ranks as then, each gets its own back. With another number, a state that was equal on all ranks is
    everybody's (a scheduler's, a sampler's that counts globally); one that was not cannot be divided: it is left out if
    `reset` names it, else ModelMismatch says which and what to do.
    """
    if len(of_ranks) == world_size:
        own = of_ranks[rank]
        return {name: own[name] for name in names if name in own}, ()
    chosen, left_out, stuck = {}, [], []
    for name in names:
        states = [of_one[name] for of_one in of_ranks if name in of_one]
        if len(states) == len(of_ranks) and all(_equal(state, states[0]) for state in states[1:]):
            chosen[name] = states[0]
        elif name in reset or not states:
            left_out.append(name)
        else:
            stuck.append(name)
    if stuck:
        raise ModelMismatch(
            f"the checkpoint was saved by {len(of_ranks)} ranks and is loaded by {world_size}; of "
            f"{', '.join(sorted(stuck))} each rank had a state of its own, which cannot be divided anew. Resume with "
            f"{len(of_ranks)} ranks, or pass reset={tuple(sorted(stuck))!r} to leave them as they are"
        )
    return chosen, tuple(left_out)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and one == other
