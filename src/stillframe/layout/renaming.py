"""A user's own names for the keys of the files, by regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from stillframe.errors import UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMapping:
    """What names become in the files: every name is matched against every pattern, anywhere in it.

    Of several that match, the one with the longest match is applied, to all of its matches, as `re.sub` does; of
    equally long ones the first. A name that none matches stays as it is.
    """

    rules: tuple[tuple[re.Pattern[str], str], ...]

    def keys_of(self, names: Iterable[str]) -> dict[str, str]:
        """Name -> key. Raises UnsupportedModel, by name, where a name would be left without a key or share one."""
        keys = {name: self.key_of(name) for name in names}
        named_by: dict[str, str] = {}
        for name, key in keys.items():
            if not key:
                raise UnsupportedModel(f"key_mapping leaves {name!r} without a key: what replaces all of it is empty")
            if key in named_by:
                raise UnsupportedModel(
                    f"key_mapping gives {named_by[key]!r} and {name!r} one key, {key!r}; one of them would be lost"
                )
            named_by[key] = name
        return keys

    def key_of(self, name: str) -> str:
        """The key of one name."""
        longest = -1
        key = name
        for pattern, replacement in self.rules:
            length = max((len(found[0]) for found in pattern.finditer(name)), default=-1)
            if length > longest:
                longest, key = length, pattern.sub(replacement, name)
        return key
