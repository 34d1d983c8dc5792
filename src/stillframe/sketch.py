"""Which tensor two ranks describe differently, found from something small enough to travel with a vote.

A digest says that two layouts differ, not where. A sketch has four hex digits for each tensor, or, where there are
more than 1,024, for each group of neighbours.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

_MAX_GROUPS = 1024
_DIGITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """`digits` of the groups, in order; `names` of all tensors, `group_size` of them in a group."""

    names: tuple[str, ...]
    group_size: int
    digits: str

    @staticmethod
    def of(described: Sequence[tuple[str, str]]) -> Sketch:
        """Of names and what is said of each: shape, dtype, distribution."""
        size = -(-len(described) // _MAX_GROUPS) or 1
        groups = (repr(described[i : i + size]).encode() for i in range(0, len(described), size))
        digits = "".join(f"{zlib.crc32(group) % 16**_DIGITS:0{_DIGITS}x}" for group in groups)
        return Sketch(names=tuple(name for name, _ in described), group_size=size, digits=digits)

    def first_difference(self, digits: str) -> str | None:
        """The first of this sketch's tensors that the one with `digits` does not have or describes differently.

        In words, as it may be one of a group. None where nothing tells: other sizes of groups, or equal digits.
        """
        for index, begin in enumerate(range(0, len(self.names), self.group_size)):
            place = slice(index * _DIGITS, (index + 1) * _DIGITS)
            if self.digits[place] != digits[place]:
                group = self.names[begin : begin + self.group_size]
                return group[0] if len(group) == 1 else f"one of the {len(group)} from {group[0]} to {group[-1]}"
        return f"one that follows {self.names[-1]}" if self.names and len(digits) > len(self.digits) else None
