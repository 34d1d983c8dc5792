"""Fields of decoded JSON, each checked: one that is missing or not of its kind raises ValueError, which names it."""

from __future__ import annotations

import re
from typing import Any


def integer(data: Any, key: str) -> int:
    """A whole number, at least 0."""
    found = required(data, key)
    if type(found) is not int or found < 0:
        raise ValueError(f"{key!r} should be a whole number, and is {found!r:.60}")
    return found


def text(data: Any, key: str) -> str:
    found = required(data, key)
    if not isinstance(found, str):
        raise ValueError(f"{key!r} should be text, and is {found!r:.60}")
    return found


def flag(data: Any, key: str) -> bool:
    found = required(data, key)
    if not isinstance(found, bool):
        raise ValueError(f"{key!r} should be true or false, and is {found!r:.60}")
    return found


def array(data: Any, key: str) -> list[Any]:
    found = required(data, key)
    if not isinstance(found, list):
        raise ValueError(f"{key!r} should be a list, and is {found!r:.60}")
    return found


def table(data: Any, key: str) -> dict[str, Any]:
    found = required(data, key)
    if not isinstance(found, dict):
        raise ValueError(f"{key!r} should be an object, and is {found!r:.60}")
    return found


def required(data: Any, key: str) -> Any:
    if not isinstance(data, dict) or key not in data:
        raise ValueError(f"{key!r} is missing")
    return data[key]


def groups_of_three(data: Any, key: str, types: tuple[type, type, type]) -> list[tuple[Any, Any, Any]]:
    """A flat list, three values at a time; each of the type that its place has, and no number below 0."""
    values = array(data, key)
    if len(values) % 3:
        raise ValueError(f"{key!r} should come in threes, and has {len(values)} values")
    groups = list(zip(values[0::3], values[1::3], values[2::3], strict=True))
    for column, expected in enumerate(types):
        for value in values[column::3]:
            if type(value) is not expected or (isinstance(value, int) and value < 0):
                raise ValueError(f"{key!r} holds {value!r:.60} where it should hold {expected.__name__}")
    return groups


def crc64(digits: str) -> int:
    """The CRC that 16 hexadecimal digits say."""
    if re.fullmatch("[0-9a-f]{16}", digits) is None:
        raise ValueError(f"a CRC should be 16 hexadecimal digits, and is {digits!r:.60}")
    return int(digits, 16)
