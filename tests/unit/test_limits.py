"""What a writer may take: what is legal, and what the environment says in another trainer's words."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from stillframe.errors import OptionError
from stillframe.limits import SLOT_VARIABLES, WriterLimits, with_variables


@pytest.mark.parametrize(
    ("name", "legal", "illegal"),
    [
        ("nice", [0, 19], [-1, 20, 1.0, True, None, "5"]),
        ("io_class", [None, "idle", "best-effort"], ["realtime", 3, ""]),
        ("export_slots", [None, 1, 1024], [0, -1, 1025, True, 1.5]),
        ("checkpoint_slots", [None, 2], [0, "2"]),
        ("bytes_per_s_max", [None, 1, 2.5e8], [0, 0.5, -1, True, float("nan"), float("inf"), "1GB"]),
    ],
)
def test_what_is_legal(name: str, legal: list[Any], illegal: list[Any]) -> None:
    for value in legal:
        assert getattr(WriterLimits(**{name: value}), name) == value
    for value in illegal:
        with pytest.raises(OptionError, match=rf"WriterLimits: {name} must be "):
            WriterLimits(**{name: value})


def test_slots_of_exports_are_read_from_the_environment_with_a_warning() -> None:
    first, second, _ = SLOT_VARIABLES
    with pytest.warns(FutureWarning, match=rf"{first} is read for compatibility.*export_slots=3"):
        assert with_variables(WriterLimits(nice=5), {first: " 3 ", second: "4"}) == WriterLimits(nice=5, export_slots=3)
    with pytest.warns(FutureWarning, match=second):
        assert with_variables(WriterLimits(), {first: "", second: "4"}).export_slots == 4


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²", "4096"])
def test_a_variable_that_says_nothing_legal_is_ignored_with_a_warning(text: str) -> None:
    with pytest.warns(FutureWarning, match=f"{SLOT_VARIABLES[2]}.* is ignored: it must be an integer from 1 to 1024"):
        assert with_variables(WriterLimits(), {SLOT_VARIABLES[2]: text}) == WriterLimits()


def test_what_is_given_goes_before_the_environment() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_variables(WriterLimits(export_slots=1), {SLOT_VARIABLES[0]: "3"}).export_slots == 1
        assert with_variables(WriterLimits(), {}) == WriterLimits()
