"""Acting together, over a real store: who is late or gone is named, every wait is bounded, nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from stillframe.commit.rendezvous import Rendezvous
from stillframe.commit.together import Together
from stillframe.errors import SaveFailed, SaveTimeout
from tests.unit.commit.meetings import PATH, meetings, on_ranks


class Calls:
    """Why the ranks were called, once they were."""

    def __init__(self) -> None:
        self._called = threading.Event()
        self._why = ""

    def __call__(self, why: str) -> None:
        self._why = why
        self._called.set()

    def wait(self) -> str:
        assert self._called.wait(60)
        return self._why


@contextmanager
def together(met: list[Rendezvous], *, timeout_s: float = 30.0) -> Iterator[list[tuple[Together, Calls]]]:
    """The part of each rank; all leave at the end, if they have not."""
    calls = [Calls() for _ in met]
    ranks = [
        Together(meeting, path=PATH, timeout_s=timeout_s, on_called=c) for meeting, c in zip(met, calls, strict=True)
    ]
    try:
        yield list(zip(ranks, calls, strict=True))
    finally:
        for rank in reversed(ranks):
            with suppress(ConnectionError):
                rank.leave(RuntimeError("the test is over"))


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("stillframe")}


@pytest.mark.parametrize("caller", [0, 2])
def test_all_act_at_the_step_after_the_furthest(caller: int) -> None:
    with together(meetings(3)) as ranks:
        for last, (rank, _) in enumerate(ranks):
            assert [rank.passes(step) for step in range(1, last + 1)] == [False] * last
        ranks[caller][0].call("SIGTERM")
        assert [calls.wait() for _, calls in ranks] == [f"SIGTERM on rank {caller}"] * 3
        assert [[rank.passes(step) for step in range(at, 4)] for at, (rank, _) in enumerate(ranks, 1)] == [
            [False, False, True],
            [False, True],
            [True],
        ]
        assert on_ranks(*(lambda rank=rank: rank.leave(None) for rank, _ in ranks)) == [None] * 3
        assert threads() == set()


def test_a_second_call_changes_nothing_and_a_second_agreement_is_another() -> None:
    met = meetings(2)
    for step in (4, 8):
        with together(met) as ranks:
            assert not any(rank.passes(step) for rank, _ in ranks)
            for rank, _ in ranks:
                rank.call("SIGUSR1")
            assert {calls.wait() for _, calls in ranks} <= {"SIGUSR1 on rank 0", "SIGUSR1 on rank 1"}
            assert [rank.passes(step + 1) for rank, _ in ranks] == [True, True]
            ranks[1][0].call("SIGUSR1")
            assert [rank.passes(step + 2) for rank, _ in ranks] == [True, True]


def test_alone() -> None:
    with together(meetings(1)) as [(rank, calls)]:
        assert not rank.passes(1)
        rank.call("SIGTERM")
        calls.wait()
        assert rank.passes(2)
        rank.leave(None)
        assert threads() == set()


def test_a_rank_that_says_nothing_is_named_on_all_others() -> None:
    met = meetings(3)
    with together(met[:2], timeout_s=0.5) as ranks:
        ranks[1][0].call("SIGTERM")
        for rank, calls in ranks:
            calls.wait()
            with pytest.raises(SaveTimeout, match=r"rank 2 did not say within 0\.5 s .* \(of 3 ranks\)") as raised:
                rank.passes(1)
            assert (raised.value.rank, raised.value.step, raised.value.stage) == (2, 1, "preemption")


def test_ranks_that_have_ended_their_training_are_not_waited_for() -> None:
    with together(meetings(3)) as ranks:
        ranks[2][0].leave(None)
        ranks[1][0].call("SIGTERM")
        for rank, calls in ranks[:2]:
            calls.wait()
            assert not rank.passes(7)
        ranks[1][0].leave(None)
        ranks[0][0].leave(None)


def test_rank_0_leaves_first_and_the_others_know() -> None:
    with together(meetings(2)) as ranks:
        ranks[0][0].leave(None)
        ranks[1][0].call("SIGTERM")
        assert not ranks[1][0].passes(1)
        ranks[1][0].leave(None)
        assert threads() == set()


def test_a_rank_whose_training_failed_is_named() -> None:
    met = meetings(3)
    with together(met[:2]) as ranks:  # rank 2 never answers, so that nothing is decided before
        ranks[0][0].call("SIGTERM")
        for _, calls in ranks:
            calls.wait()
        ranks[1][0].leave(ValueError("a loss that is no number"))
        with pytest.raises(SaveFailed, match=r"rank 1 .*its training ended: ValueError: a loss that is no number"):
            ranks[0][0].passes(1)


def test_rank_0_is_gone() -> None:
    met = meetings(2)
    with together(met[1:]) as [(rank, _)]:
        assert not rank.passes(1)
        met[0].leave()
        # Rank 0's end closes the store; its last holder here.
        del met[0]
        rank.call("SIGTERM")
        assert not rank.passes(2)
        rank.leave(None)
        assert threads() == set()
