"""The rules of retention: what each keeps, how they join, and what cannot be built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stillframe.errors import OptionError
from stillframe.policies import (
    KeepAll,
    KeepAny,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepYoungerThan,
    RetentionPolicy,
)
from stillframe.records import CatalogEntry

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)


def entry(step: int, *, loss: float | None = None, age_s: float = 0.0, published_at: str | None = None) -> CatalogEntry:
    return CatalogEntry(
        path=Path(f"/run/checkpoint-{step}"),
        kind="checkpoint",
        step=step,
        sequence=step,
        world_size=1,
        size_bytes=0,
        published_at=(NOW - timedelta(seconds=age_s)).isoformat() if published_at is None else published_at,
        metrics={} if loss is None else {"loss": loss},
    )


def kept_steps(policy: RetentionPolicy, entries: Sequence[CatalogEntry]) -> list[int]:
    return sorted(kept.step for kept in policy.kept(entries, now=NOW))


LOSSES = [entry(1, loss=3.0), entry(2), entry(3, loss=-1.0), entry(4, loss=3.0), entry(5, loss=2.0), entry(6)]


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (KeepAll(), [1, 2, 3, 4, 5, 6]),
        (KeepLast(1), [6]),
        (KeepLast(4), [3, 4, 5, 6]),
        (KeepLast(100), [1, 2, 3, 4, 5, 6]),
        (KeepEvery(1), [1, 2, 3, 4, 5, 6]),
        (KeepEvery(3), [3, 6]),
        (KeepEvery(7), []),
        (KeepBest("loss"), [3]),
        (KeepBest("loss", 2), [3, 5]),
        (KeepBest("loss", 3), [3, 4, 5]),  # of the equal ones the newer
        (KeepBest("loss", 9), [1, 3, 4, 5]),
        (KeepBest("loss", mode="max"), [4]),
        (KeepBest("loss", 3, mode="max"), [1, 4, 5]),
        (KeepBest("accuracy"), []),
        (KeepLast(1) | KeepBest("loss"), [3, 6]),
        (KeepLast(1) | KeepBest("loss") | KeepEvery(2), [2, 3, 4, 6]),
        (KeepAny([KeepBest("accuracy"), KeepEvery(7)]), []),
    ],
    ids=repr,
)
def test_what_a_rule_keeps(policy: RetentionPolicy, steps: list[int]) -> None:
    assert kept_steps(policy, LOSSES) == steps
    assert kept_steps(policy, []) == []


def test_the_zeroth_step_is_a_multiple() -> None:
    assert kept_steps(KeepEvery(1000), [entry(0), entry(999)]) == [0]


def test_age_is_by_the_clock_that_is_passed() -> None:
    entries = [
        entry(1, age_s=86_400.0),
        entry(2, age_s=60.0),
        entry(3, age_s=59.9),
        entry(4, age_s=-3600.0),  # a host whose clock is ahead
        entry(5, published_at="2026-01-02T13:59:30+02:00"),
        entry(6, published_at="2026-01-02T11:59:30"),  # no zone: UTC
        entry(7, published_at="2026-01-02T13:58:30+02:00"),
    ]
    assert kept_steps(KeepYoungerThan(60), entries) == [3, 4, 5, 6]
    assert kept_steps(KeepYoungerThan(1e12), entries) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("published_at", ["", "yesterday", "0001-01-01T00:00:00+14:00"])
def test_what_has_no_age_is_not_deleted_for_its_age(published_at: str) -> None:
    assert kept_steps(KeepYoungerThan(1), [entry(1, published_at=published_at)]) == [1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KeepLast(0), "KeepLast: count must be an integer of at least 1, not 0"),
        (lambda: KeepLast(-1), "KeepLast: count .* not -1"),
        (lambda: KeepLast(True), "KeepLast: count .* not True"),
        (lambda: KeepLast(2.0), "KeepLast: count .* not 2.0"),  # type: ignore[arg-type]
        (lambda: KeepEvery(0), "KeepEvery: steps must be an integer of at least 1, not 0"),
        (lambda: KeepEvery("2"), "KeepEvery: steps .* not '2'"),  # type: ignore[arg-type]
        (lambda: KeepBest(""), "KeepBest: metric must be the name of a metric, not ''"),
        (lambda: KeepBest(3), "KeepBest: metric .* not 3"),  # type: ignore[arg-type]
        (lambda: KeepBest("loss", 0), "KeepBest: count .* not 0"),
        (lambda: KeepBest("loss", mode="lowest"), "KeepBest: mode must be 'min' .* or 'max', not 'lowest'"),
        (lambda: KeepYoungerThan(0), "KeepYoungerThan: seconds must be a number above 0 .* not 0"),
        (lambda: KeepYoungerThan(float("nan")), "KeepYoungerThan: seconds .* not nan"),
        (lambda: KeepYoungerThan(float("inf")), "KeepYoungerThan: seconds .* not inf"),
        (lambda: KeepYoungerThan(10**400), "KeepYoungerThan: seconds .* not 1000"),
        (lambda: KeepYoungerThan(True), "KeepYoungerThan: seconds .* not True"),
        (lambda: KeepAny(()), "KeepAny: policies is empty"),
        (lambda: KeepAny((KeepAll(), 3)), "KeepAny: policies must be a sequence of retention policies"),  # type: ignore[arg-type]
        (lambda: KeepAny(KeepAll()), "KeepAny: policies must be a sequence"),  # type: ignore[arg-type]
    ],
)
def test_an_illegal_rule_cannot_be_built(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build()


def test_rules_join_with_rules_only() -> None:
    with pytest.raises(TypeError):
        KeepLast(1) | 3  # type: ignore[operator]


def test_rules_are_values() -> None:
    policies = [KeepLast(1)]
    joined = KeepAny(policies)
    policies.clear()  # what was passed in is the caller's
    assert joined == KeepAny((KeepLast(1),))
    assert hash(KeepLast(1) | KeepEvery(2)) == hash(KeepLast(1) | KeepEvery(2))
    with pytest.raises(FrozenInstanceError):
        KeepLast(1).count = 2  # type: ignore[misc]


def test_a_rule_of_the_user_s_own_joins_too() -> None:
    class KeepOdd(RetentionPolicy):
        def kept(self, entries: Sequence[CatalogEntry], *, now: datetime) -> frozenset[CatalogEntry]:
            return frozenset(entry for entry in entries if entry.step % 2)

    assert kept_steps(KeepOdd() | KeepLast(1), LOSSES) == [1, 3, 5, 6]
    assert kept_steps(KeepLast(1) | KeepOdd(), LOSSES) == [1, 3, 5, 6]
