"""Ranks that load the stages of a pipeline: what none of them takes of a directory, and what any of them lacks.

Each rank finds out for itself what it takes of the files, by the names and conversions of its own part of the model.
Of what it does not take, it cannot know whether another stage does. So the ranks tell each other, once, before any of
them writes to its model: a key is unexpected if it is to all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stillframe.commit.exchange import Exchanged, exchange_once
from stillframe.commit.failure import in_words
from stillframe.errors import LoadError, SaveFailed, SaveTimeout
from stillframe.load.directory import WeightFile
from stillframe.load.matching import Match


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherStages:
    """The other ranks that load `directory`, each into its stage; `timeout_s` bounds the wait for them."""

    directory: Path
    timeout_s: float

    def agree(self, own: Match, files: Sequence[WeightFile]) -> Match:
        """The match of the whole model, without targets, the same on all ranks: `own` and that of each other stage.
        The ranks that miss something are named with it.

        Every rank calls this, or `fail`, once; blocks until all have. Raises on all of them what one has failed with,
        or LoadError where ranks see different files or did not come in time.
        """
        keys = sorted(tensor.name for file in files for tensor in file.tensors)
        told = self._exchange(_encoded(own, keys, files))
        parts = [json.loads(text) for text in told.texts]
        for part, ranks in zip(parts, told.ranks, strict=True):
            if part["files"] != parts[0]["files"]:
                raise LoadError(
                    f"{self.directory}: {in_words(told.ranks[0])} and {in_words(ranks)} find different tensors in the "
                    "files; give all ranks the same directory, or copies of it"
                )
        untaken = np.logical_and.reduce([_bits(part["untaken"], len(keys)) for part in parts])
        return Match(
            targets=(),
            missing=tuple(_of_ranks(parts, told.ranks, "missing")),
            unexpected=tuple(keys[index] for index in np.flatnonzero(untaken).tolist()),
            unfit=_of_ranks(parts, told.ranks, "unfit"),
        )

    def fail(self, error: Exception) -> None:
        """Tell the others what keeps this rank from loading. Raises `error`, or what another rank failed with."""
        self._exchange(error)

    def _exchange(self, text: str | Exception) -> Exchanged:
        return tell_all(text, what="loads", directory=self.directory, timeout_s=self.timeout_s)


def tell_all(text: str | Exception, *, what: str, directory: Path, timeout_s: float) -> Exchanged:
    """`commit.exchange.exchange_once`, for a load of `directory`: raises on all ranks what one has failed with, or
    LoadError where one does not come in time."""
    try:
        return exchange_once(text, what=what, path=directory, timeout_s=timeout_s)
    except SaveTimeout as error:
        raise LoadError(f"{directory}: {error.reason}") from error
    except SaveFailed as error:
        where = "" if error.rank is None else f"rank {error.rank}: "
        raise LoadError(f"{directory}: {where}{error.reason}") from error


def without_unexpected(own: Match) -> Match:
    """What a rank can tell of its match before it knows those of the others."""
    return replace(own, unexpected=())


def _encoded(own: Match, keys: Sequence[str], files: Sequence[WeightFile]) -> str:
    """The same text on ranks of one stage that see the same files."""
    stored = sorted((t.name, t.shape, str(t.dtype)) for file in files for t in file.tensors)
    untaken = set(own.unexpected)
    return json.dumps(
        {
            "files": hashlib.sha256(repr(stored).encode()).hexdigest(),
            "untaken": np.packbits([key in untaken for key in keys]).tobytes().hex(),
            "missing": dict.fromkeys(own.missing, ""),
            "unfit": dict(sorted(own.unfit.items())),
        }
    )


def _bits(text: str, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(np.bool_)


def _of_ranks(parts: Sequence[Any], ranks: Sequence[tuple[int, ...]], what: str) -> dict[str, str]:
    """What any part has of that, by name and the ranks that have it."""
    having: dict[str, tuple[str, list[int]]] = {}
    for part, of_part in zip(parts, ranks, strict=True):
        for name, reason in part[what].items():
            having.setdefault(name, (reason, []))[1].extend(of_part)
    return {f"{name} (on {in_words(sorted(on))})": reason for name, (reason, on) in sorted(having.items())}
