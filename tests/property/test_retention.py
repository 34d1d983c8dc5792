"""Retention, whatever the rules, the branches and the damage: the last good one stays, and nothing foreign goes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from stillframe.catalog.retention import superseded
from stillframe.names import KINDS
from stillframe.policies import (
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepYoungerThan,
    Retention,
    RetentionPolicy,
)
from stillframe.records import CatalogEntry

NOW = datetime(2026, 1, 2, tzinfo=UTC)
FAMILIES = (("hf", "step"), ("checkpoint", "step"), ("snapshot",))
BRANCHES = ("", "second")

metrics = st.dictionaries(st.sampled_from(["loss", "accuracy"]), st.floats(-2, 2) | st.integers(-2, 2))
ages_s = st.integers(-10, 100)
simple_policies = (
    st.just(KeepAll())
    | st.builds(KeepLast, st.integers(1, 6))
    | st.builds(KeepEvery, st.integers(1, 6))
    | st.builds(KeepBest, st.sampled_from(["loss", "accuracy"]), st.integers(1, 3), st.sampled_from(["min", "max"]))
    | st.builds(KeepYoungerThan, st.integers(1, 100))
)
policies = st.recursive(simple_policies, lambda inner: st.builds(lambda a, b: a | b, inner, inner), max_leaves=4)


@st.composite
def run_directories(draw: st.DrawFn) -> tuple[CatalogEntry, ...]:
    """What a list of a run directory may be: names are unique, sequences usually, and the order is theirs."""
    names = draw(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 8)), unique=True, max_size=14))
    return tuple(
        CatalogEntry(
            path=Path(f"/run/{kind}-{step}"),
            kind=kind,
            step=step,
            sequence=sequence,
            world_size=1,
            size_bytes=0,
            published_at=(NOW - timedelta(seconds=draw(ages_s))).isoformat(),
            branch=draw(st.sampled_from(BRANCHES)),
            metrics=draw(metrics),
        )
        for sequence, (kind, step) in enumerate(names)
    )


@given(run_directories(), policies, policies, st.sampled_from(BRANCHES), st.data())
def test_the_last_good_one_stays_and_nothing_foreign_goes(
    entries: tuple[CatalogEntry, ...],
    checkpoints: RetentionPolicy,
    exports: RetentionPolicy,
    branch: str,
    data: st.DataObject,
) -> None:
    damaged = data.draw(st.sets(st.sampled_from(entries))) if entries else set()
    result = superseded(
        entries,
        Retention(checkpoints=checkpoints, exports=exports),
        branch=branch,
        now=NOW,
        damage_of=lambda entry: "hit by a meteorite" if entry in damaged else None,
    )
    gone = set(result.entries)
    assert all(entry.branch == branch for entry in gone)
    assert [entry for entry in entries if entry in gone] == list(result.entries)
    found = {one.entry for one in result.damaged}
    assert found <= damaged
    assert not found & gone
    for kinds in FAMILIES:
        family = [entry for entry in entries if entry.branch == branch and entry.kind in kinds]
        whole = [entry for entry in family if entry not in damaged]
        if whole:
            assert whole[-1] not in gone
        else:
            assert not gone.intersection(family)
        # What supersedes is there, is whole, and is newer.
        for entry in gone.intersection(family):
            assert any(other not in gone and other.sequence > entry.sequence for other in whole)


@given(run_directories(), policies, policies)
def test_where_all_is_whole_what_a_rule_keeps_stays_and_the_rest_goes(
    entries: tuple[CatalogEntry, ...], checkpoints: RetentionPolicy, exports: RetentionPolicy
) -> None:
    result = superseded(
        entries,
        Retention(checkpoints=checkpoints, exports=exports),
        branch="",
        now=NOW,
        damage_of=lambda entry: None,
    )
    expected: set[CatalogEntry] = set()
    for kinds, policy in zip(FAMILIES, (exports, checkpoints, KeepLast(1)), strict=True):
        family = [entry for entry in entries if entry.branch == "" and entry.kind in kinds]
        expected |= policy.kept(family, now=NOW) | set(family[-1:])
    assert set(result.entries) == {entry for entry in entries if entry.branch == ""} - expected
    assert result.damaged == ()
    # Once they are gone, nothing more goes.
    left = tuple(entry for entry in entries if entry not in set(result.entries))
    again = superseded(
        left, Retention(checkpoints=checkpoints, exports=exports), branch="", now=NOW, damage_of=lambda entry: None
    )
    assert again.entries == ()


@given(run_directories(), policies, policies)
def test_a_union_keeps_what_either_keeps(
    entries: tuple[CatalogEntry, ...], one: RetentionPolicy, other: RetentionPolicy
) -> None:
    both = (one | other).kept(entries, now=NOW)
    assert both == one.kept(entries, now=NOW) | other.kept(entries, now=NOW)
    assert both <= set(entries)
