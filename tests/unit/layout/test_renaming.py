"""Names by a user's own rules: which rule wins, and mappings that would lose a tensor."""

from __future__ import annotations

import pytest

from stillframe.errors import UnsupportedModel
from stillframe.layout.renaming import KeyMapping
from stillframe.options import key_rules


def mapping(rules: dict[str, str]) -> KeyMapping:
    compiled = key_rules(rules)
    assert compiled is not None
    return KeyMapping(rules=compiled)


@pytest.mark.parametrize(
    ("rules", "name", "key"),
    [
        ({}, "layers.0.weight", "layers.0.weight"),
        ({"blocks": "layers"}, "layers.0.weight", "layers.0.weight"),
        ({r"layers\.": "model.layers."}, "layers.0.weight", "model.layers.0.weight"),
        ({"^": "model."}, "norm.weight", "model.norm.weight"),
        ({"w1": "up", r"experts\.w1": "experts.gate"}, "experts.w1", "experts.gate"),
        ({r"experts\.w1": "experts.gate", "w1": "up"}, "experts.w1", "experts.gate"),
        ({"^": "model.", "^head": "lm_head"}, "head.weight", "lm_head.weight"),
        ({"ab": "first", "bc": "second"}, "abc", "firstc"),
        ({r"a\.\d+": "n", r"a\.0\.": "zero."}, "a.0.a.123", "n.n"),
        ({r"layers\.(\d+)\.(?P<part>\w+)": r"h.\1.the_\g<part>"}, "layers.12.mlp.weight", "h.12.the_mlp.weight"),
        ({"x": "y"}, "x.x.x", "y.y.y"),
    ],
    ids=[
        "no rule",
        "no match",
        "one match",
        "an empty match",
        "the longest last",
        "the longest first",
        "any match is longer than an empty one",
        "the first of equally long ones",
        "the longest of several matches counts",
        "groups",
        "every match is replaced",
    ],
)
def test_the_longest_match_wins(rules: dict[str, str], name: str, key: str) -> None:
    assert mapping(rules).keys_of([name]) == {name: key}


def test_every_name_is_matched_against_every_pattern() -> None:
    rules = {r"^a\.": "x.", r"^b\.": "y.", r"\.bias$": ".b"}
    assert mapping(rules).keys_of(["a.weight", "b.weight", "c.bias", "d"]) == {
        "a.weight": "x.weight",
        "b.weight": "y.weight",
        "c.bias": "c.b",
        "d": "d",
    }


def test_two_names_that_would_share_a_key_are_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"key_mapping gives 'gate\.weight' and 'up\.weight' one key, 'w\.weight'"
    ):
        mapping({"gate|up": "w"}).keys_of(["norm.weight", "gate.weight", "up.weight"])
    with pytest.raises(UnsupportedModel, match="gives 'a' and 'b' one key, 'b'"):
        mapping({"a": "b"}).keys_of(["a", "b"])


def test_two_names_that_change_places_are_not_refused() -> None:
    assert mapping({"^a$": "b", "^b$": "a"}).keys_of(["a", "b"]) == {"a": "b", "b": "a"}


def test_a_name_that_would_be_dropped_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"leaves 'extra\.weight' without a key"):
        mapping({r"extra\..*": ""}).keys_of(["norm.weight", "extra.weight"])
