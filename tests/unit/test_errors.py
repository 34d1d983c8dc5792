"""The exception tree: what its docstring draws is what there is, and each survives a trip to another process."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest

from stillframe import errors
from stillframe.errors import SaveFailed, StillframeError

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, StillframeError)]


def drawn() -> dict[str, int]:
    """The names in the docstring's tree, with their depth."""
    assert errors.__doc__ is not None
    tree = {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"^    ((?:[│├└─]| )*)([A-Z]\w+)", line)
        if match:
            tree[match[2]] = len(match[1]) // 4
    return tree


def test_the_docstring_draws_the_whole_tree() -> None:
    depths = {cls.__name__: len([base for base in cls.__mro__ if base in CLASSES]) - 1 for cls in CLASSES}
    assert drawn() == depths
    assert issubclass(errors.OptionError, ValueError)


def test_every_class_says_what_it_means() -> None:
    assert [cls for cls in CLASSES if not (cls.__doc__ or "").strip()] == []


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_pickling_and_copying(cls: type[StillframeError]) -> None:
    if issubclass(cls, SaveFailed):
        error = cls("disk full", step=5, rank=1, stage="write", path=Path("/run/hf-5"))
    else:
        error = cls("disk full")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is cls
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_a_failed_save_says_what_where_and_why() -> None:
    path = Path("/run/hf-5")
    error = SaveFailed("disk full", step=5, rank=1, stage="write", path=path)
    assert str(error) == "save of step 5 failed on rank 1 in stage 'write' for /run/hf-5: disk full"
    assert (error.reason, error.step, error.rank, error.stage, error.path) == ("disk full", 5, 1, "write", path)
    start = SaveFailed("ranks differ", step=None, rank=None, stage="start", path=Path("/run"))
    assert str(start) == "start of the Checkpointer failed in stage 'start' for /run: ranks differ"
