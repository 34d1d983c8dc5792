"""A sketch tells where two lists of descriptions begin to differ."""

from __future__ import annotations

import pytest

from stillframe.sketch import Sketch

MANY = [(f"t{i}", "f32") for i in range(5000)]


def changed(index: int) -> list[tuple[str, str]]:
    return [(name, "bf16" if i == index else what) for i, (name, what) in enumerate(MANY)]


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        ([("a", "1"), ("b", "2")], [("a", "1"), ("b", "3")], "b"),
        ([("a", "1"), ("b", "2")], [("c", "1"), ("b", "3")], "a"),
        ([("a", "1"), ("b", "2")], [("a", "1")], "b"),
        ([("a", "1")], [("a", "1"), ("b", "2")], "one that follows a"),
        ([("a", "1")], [("a", "1")], None),
        ([("a", "1")], [], "a"),
        ([], [], None),
        (MANY, changed(0), "one of the 5 from t0 to t4"),
        (MANY, changed(4999), "one of the 5 from t4995 to t4999"),
        (MANY, changed(777), "one of the 5 from t775 to t779"),
    ],
)
def test_the_first_difference_is_named(
    own: list[tuple[str, str]], other: list[tuple[str, str]], said: str | None
) -> None:
    assert Sketch.of(own).first_difference(Sketch.of(other).digits) == said


def test_a_sketch_of_many_tensors_is_small() -> None:
    assert len(Sketch.of(MANY).digits) <= 4096
    assert len(Sketch.of(MANY * 20).digits) <= 4096
