"""States of objects travel without code, and are divided anew only where that loses nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from stillframe.errors import ModelMismatch, OptionError
from stillframe.state.objects import check_stateful, choose_states, render_rank_state


class Meter:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class Foreign:
    """Of no use to `weights_only`."""


def test_a_rank_state_is_read_without_code() -> None:
    state = {"position": 7, "ids": [1, 2], "mean": torch.tensor(0.5), "name": "train", "nested": {"a": (1, None)}}
    content = render_rank_state({"meter": Meter(state)})
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert loaded.keys() == {"rng", "meter"}
    assert loaded["meter"] == state


def test_a_state_that_would_need_code_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"the state of 'odd' holds more than .*Foreign"):
        render_rank_state({"fine": Meter(1), "odd": Meter({"x": Foreign()})})


@pytest.mark.parametrize(("name", "value"), [("rng", Meter(1)), ("", Meter(1)), ("loader", [1, 2])])
def test_what_is_not_stateful_is_refused(name: str, value: object) -> None:
    with pytest.raises(OptionError, match="stateful: "):
        check_stateful({name: value})


def saved(*states: dict[str, Any]) -> list[dict[str, Any]]:
    return list(states)


def test_the_same_number_of_ranks_get_their_own() -> None:
    of_ranks = saved({"a": 1, "b": 5}, {"a": 2, "b": 5})
    assert choose_states(of_ranks, rank=1, world_size=2, names=["a", "b"], reset=()) == ({"a": 2, "b": 5}, ())


@pytest.mark.parametrize("same", [torch.arange(3), [1, {"x": (2, torch.ones(1))}], None, 1.5])
def test_what_was_equal_everywhere_is_everybodys(same: Any) -> None:
    chosen, left = choose_states(saved({"a": same}, {"a": same}), rank=2, world_size=3, names=["a"], reset=())
    assert chosen["a"] is same
    assert left == ()


@pytest.mark.parametrize(
    ("one", "other"), [(1, 2), (1, 1.0), (1, True), ([1], [1, 2]), ({"x": 1}, {"y": 1}), (torch.ones(1), 1)]
)
def test_what_differed_is_refused_or_left(one: Any, other: Any) -> None:
    of_ranks = saved({"a": one, "b": 0}, {"a": other, "b": 0})
    with pytest.raises(ModelMismatch, match=r"saved by 2 ranks and is loaded by 1; of a each .* reset=\('a',\)"):
        choose_states(of_ranks, rank=0, world_size=1, names=["a", "b"], reset=())
    assert choose_states(of_ranks, rank=0, world_size=1, names=["a", "b"], reset=["a"]) == ({"b": 0}, ("a",))


def test_what_only_some_ranks_have_is_not_everybodys() -> None:
    with pytest.raises(ModelMismatch, match="of a each rank"):
        choose_states(saved({"a": 1}, {}), rank=0, world_size=1, names=["a"], reset=())
