"""What a value in a configuration may be: each rule takes what TOML gave and returns it typed, or says what is legal.

A rule raises `Illegal` with a description of the legal values ("an integer of at least 1"); who calls it adds the
key, the file and the value that was found.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillframe.errors import OptionError
from stillframe.options import CheckpointerOptions

Rule = Callable[[object], Any]


class Illegal(Exception):
    """The message says what would have been legal."""


def integer(*, at_least: int, at_most: int | None = None, or_minus_one: bool = False) -> Rule:
    """An integer within bounds, not a boolean (which Python counts as one)."""
    legal = f"an integer of at least {at_least}" + ("" if at_most is None else f" and at most {at_most}")
    legal += ", or -1" if or_minus_one else ""

    def rule(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Illegal(legal)
        if or_minus_one and value == -1:
            return value
        if value < at_least:
            raise Illegal(legal)
        if at_most is not None and value > at_most:
            raise Illegal(legal)
        return value

    return rule


def number(
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    or_inf: bool = False,
) -> Rule:
    """A float or integer within bounds, finite unless `or_inf`; NaN never."""
    bounds = [("above", above), ("at least", at_least), ("at most", at_most), ("below", below)]
    legal = " ".join(["a number", " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)])
    legal = legal.strip() + (", or inf" if or_inf else "")

    def rule(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Illegal(legal)
        if or_inf and value == math.inf:
            return math.inf
        if (
            abs(value) > sys.float_info.max
            or not math.isfinite(value)
            or (above is not None and value <= above)
            or (at_least is not None and value < at_least)
            or (at_most is not None and value > at_most)
            or (below is not None and value >= below)
        ):
            raise Illegal(legal)
        return float(value)

    return rule


def text(value: object) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise Illegal("a string that is not empty")
    return value


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise Illegal("true or false")
    return value


def one_of(*choices: str) -> Rule:
    def rule(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise Illegal("one of " + ", ".join(repr(choice) for choice in choices))
        return value

    return rule


def list_of(item: Rule, *, of_what: str, at_least: int = 0) -> Rule:
    """A list; `of_what` names its items in the plural ("paths"). Returned as a tuple."""

    def rule(value: object) -> tuple[Any, ...]:
        legal = f"a list of {of_what}" + (f", at least {at_least}" if at_least else "")
        if not isinstance(value, list) or len(value) < at_least:
            raise Illegal(legal)
        try:
            return tuple(item(entry) for entry in value)
        except Illegal as error:
            raise Illegal(f"{legal}, each {error}") from error

    return rule


def pair(item: Rule) -> Rule:
    def rule(value: object) -> tuple[Any, Any]:
        if not isinstance(value, list) or len(value) != 2:
            raise Illegal("a list of two")
        try:
            return item(value[0]), item(value[1])
        except Illegal as error:
            raise Illegal(f"a list of two, each {error}") from error

    return rule


def pattern(value: object) -> str:
    """A regular expression."""
    if isinstance(value, str):
        with contextlib.suppress(re.error):
            re.compile(value)
            return value
    raise Illegal("a regular expression")


def size(value: object) -> str | int:
    """A number of bytes or text such as "5GB": what the Checkpointer takes as `max_shard_size`."""
    if isinstance(value, int | str):
        with contextlib.suppress(OptionError):
            CheckpointerOptions(run_dir=Path(), max_shard_size=value)
            return value
    raise Illegal("a positive number of bytes, or text such as '500MB' or '5GB' (decimal units)")


def table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Illegal("a table")
    return value
