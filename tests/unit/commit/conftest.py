"""Files that resist, for the commit's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.commit.immutable import immutable


@pytest.fixture(name="immutable")
def fixture_immutable() -> Iterator[Callable[[Path], None]]:
    """Make a file or directory immutable until the test ends; skips where that cannot be done."""
    with ExitStack() as stack:

        def make(path: Path) -> None:
            try:
                stack.enter_context(immutable(path))
            except OSError as error:
                pytest.skip(f"nothing can be made immutable here: {error}")

        yield make
