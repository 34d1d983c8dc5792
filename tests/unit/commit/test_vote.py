"""The vote: all or nothing on all ranks, every wait bounded, and everyone who failed or is late is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from stillframe.commit.failure import Failure, in_words
from stillframe.commit.rendezvous import Rendezvous
from stillframe.commit.store import BoundedStore
from stillframe.commit.vote import Aftermath, Ballot, Vote
from stillframe.errors import (
    CheckpointExists,
    InsufficientSpace,
    RunDirectoryError,
    SaveFailed,
    SaveTimeout,
    StillframeError,
    UnsupportedModel,
    WriteFailed,
    WriterDied,
)
from stillframe.records import Recovered
from stillframe.sketch import Sketch
from tests.unit.commit.meetings import NONCE, PATH, ballots, meetings, on_ranks

DISK_FULL = Failure(error="WriteFailed", rank=1, stage="write", reason="No space left on device")
RECOVERED = Recovered(path=Path("/run/.hf-3.incomplete"), kind="hf", step=3, action="removed", reason="not whole")


def vote(rank: int, *, step: int | None = 5, digest: str = "d", failure: Failure | None = None) -> Vote:
    return Vote(rank=rank, step=step, layout_digest=digest, failure=failure)


def cast(votes: list[Vote], *, world_size: int, timeout_s: float = 30.0) -> Ballot:
    """Rank 0's ballot with these votes in it."""
    (meeting,) = meetings(1)
    ballot = Ballot(replace(meeting, world_size=world_size), step=5, path=PATH, timeout_s=timeout_s)
    for one in votes:
        ballot.cast(one)
    return ballot


# One attempt from end to end


def test_everyone_hears_that_it_is_published_and_what_followed() -> None:
    all_ballots = ballots(3)
    aftermath = Aftermath(
        trouble=replace(DISK_FULL, rank=0, stage="retention"), steps={"hf": (3, 5)}, recovered=(RECOVERED,)
    )

    def rank_0() -> tuple[Vote, ...]:
        all_ballots[0].open(None)
        all_ballots[0].cast(vote(0))
        votes = all_ballots[0].collect()
        all_ballots[0].decide(None)
        all_ballots[0].conclude(aftermath)
        all_ballots[0].acknowledge()
        return votes

    def other(rank: int) -> Aftermath:
        all_ballots[rank].await_open()
        all_ballots[rank].cast(vote(rank))
        all_ballots[rank].await_verdict()
        heard = all_ballots[rank].await_aftermath()
        all_ballots[rank].acknowledge()
        return heard

    votes, *heard = on_ranks(rank_0, lambda: other(1), lambda: other(2))
    assert votes == (vote(0), vote(1), vote(2))
    assert heard == [aftermath, aftermath]
    assert all_ballots[0].await_acknowledged(30)


def test_one_rank_alone_votes_without_a_server() -> None:
    store = BoundedStore(HashStore(), remote=False, answer_timeout_s=30)
    ballot = Ballot(
        Rendezvous(rank=0, world_size=1, nonce=NONCE, store=store), step=5, path=PATH, timeout_s=30, number=1
    )
    ballot.open(None)
    ballot.cast(vote(0))
    assert ballot.collect() == (vote(0),)
    ballot.decide(None)
    ballot.conclude(Aftermath(trouble=None, steps={"hf": (5,)}))
    assert not ballot.await_acknowledged(0)
    ballot.acknowledge()
    assert ballot.await_acknowledged(0)
    ballot.forget()


@pytest.mark.parametrize("cls", [RunDirectoryError, UnsupportedModel])
def test_a_failure_of_the_start_arrives_as_the_exception_that_it_was(cls: type[StillframeError]) -> None:
    failure = replace(DISK_FULL, error=cls.__name__, rank=2, stage="start")
    error = failure.exception(step=None, path=PATH)
    assert type(error) is cls
    assert str(error) == "rank 2: No space left on device"


@pytest.mark.parametrize(
    ("failure", "cls", "said"),
    [
        (DISK_FULL, WriteFailed, "save of step 5 failed on rank 1 in stage 'write' for /run/hf-5: No space left"),
        (replace(DISK_FULL, error="InsufficientSpace"), InsufficientSpace, "No space left on device"),
        # Of a save, every failure has step, rank and path, so one of another kind is told as the cause.
        (
            replace(DISK_FULL, error="RunDirectoryError"),
            SaveFailed,
            r"step 5 failed on rank 1 .*RunDirectoryError: No sp",
        ),
        (
            replace(DISK_FULL, error="UnsupportedModel", rank=0),
            SaveFailed,
            r"on rank 0 .*UnsupportedModel: No space left",
        ),
        (replace(DISK_FULL, error="Path"), SaveFailed, "No space left on device"),  # a name in errors, but no error
        (replace(DISK_FULL, error="SystemExit"), SaveFailed, "No space left on device"),
    ],
)
def test_a_failure_arrives_as_the_exception_that_it_was(failure: Failure, cls: type[Exception], said: str) -> None:
    first, second = ballots(2)
    first.open(failure)
    with pytest.raises(cls, match=said) as caught:
        second.await_open()
    assert type(caught.value) is cls
    first, second = ballots(2)
    first.decide(failure)
    with pytest.raises(cls, match=said):
        second.await_verdict()


@pytest.mark.parametrize(
    "error",
    [
        CheckpointExists("it exists", step=5, rank=0, stage="prepare", path=PATH),
        SaveTimeout("ranks 1, 2", step=5, rank=None, stage="vote", path=PATH),
        RunDirectoryError("cannot write"),
        OSError(5, "Input/output error", "/run"),
    ],
)
def test_an_exception_keeps_its_kind_and_words_on_its_way(error: Exception) -> None:
    failure = Failure.of(error, rank=3, stage="publish")
    arrived = failure.exception(step=5, path=PATH)
    if isinstance(error, SaveFailed):
        assert type(arrived) is type(error)
        assert str(arrived) == str(error)
    else:
        assert isinstance(arrived, SaveFailed)
        assert (arrived.rank, arrived.stage) == (3, "publish")
        assert arrived.reason == f"{type(error).__name__}: {error}"


def test_an_exception_that_came_from_another_rank_stays_of_that_rank() -> None:
    failure = replace(DISK_FULL, error="UnsupportedModel", rank=3)
    arrived = failure.exception(step=None, path=PATH)
    again = Failure.of(arrived, rank=0, stage="start").exception(step=None, path=PATH)
    assert str(again) == str(arrived) == "rank 3: No space left on device"


# Votes that do not agree


def test_late_ranks_are_named() -> None:
    ballot = cast([vote(0), vote(2)], world_size=4, timeout_s=0.2)
    with pytest.raises(SaveTimeout, match=r"ranks 1, 3 did not report within 0 s \(of 4 ranks\)") as caught:
        ballot.collect()
    assert (caught.value.rank, caught.value.stage, caught.value.step) == (1, "vote", 5)


def test_of_many_late_ranks_some_are_named_and_the_rest_counted() -> None:
    assert in_words([3]) == "rank 3"
    assert in_words(list(range(16))) == "ranks " + ", ".join(str(rank) for rank in range(16))
    assert in_words(list(range(20))).endswith("14, 15 and 4 more")


def test_every_failed_rank_is_named_with_its_reason() -> None:
    died = Failure(error="WriterDied", rank=2, stage="write", reason="was killed by SIGKILL")
    ballot = cast([vote(0), vote(2, failure=died), vote(1, failure=DISK_FULL)], world_size=3)
    with pytest.raises(WriteFailed) as caught:
        ballot.collect()
    assert caught.value.rank == 1
    assert "rank 1 in stage 'write': No space left on device; rank 2 in stage 'write': was killed" in str(caught.value)


def test_with_a_failure_those_that_are_late_are_named_too() -> None:
    died = Failure(error="WriterDied", rank=1, stage="write", reason="was killed by SIGKILL")
    ballot = cast([vote(0), vote(1, failure=died)], world_size=4, timeout_s=0.2)
    with pytest.raises(WriterDied, match="was killed by SIGKILL; no word from ranks 2, 3"):
        ballot.collect()


def test_of_many_failures_the_first_are_told_and_the_rest_named() -> None:
    votes = [vote(rank, failure=replace(DISK_FULL, rank=rank)) for rank in range(20)]
    with pytest.raises(WriteFailed) as caught:
        cast(votes, world_size=22, timeout_s=0.2).collect()
    assert caught.value.reason.count("No space left") == 16
    assert caught.value.reason.endswith("; also ranks 16, 17, 18, 19; no word from ranks 20, 21")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (vote(1, step=6), "rank 1 saves step 6 while rank 0 saves step 5"),
        (vote(1, digest="e"), "rank 1 has another layout than rank 0: do all ranks have the same model and options?"),
    ],
)
def test_ranks_that_do_not_agree_are_named(other: Vote, said: str) -> None:
    with pytest.raises(SaveFailed, match=said) as caught:
        cast([vote(0), other, vote(2)], world_size=3).collect()
    assert caught.value.rank == 1


def test_the_first_tensor_that_a_rank_describes_differently_is_named() -> None:
    own = Sketch.of([("embed", "f32"), ("head", "f32"), ("norm", "f32")])
    other = Sketch.of([("embed", "f32"), ("head", "bf16"), ("norm", "bf16")])
    said = "rank 1 has another layout than rank 0: .* The first tensor that they describe differently: head$"
    dissent = replace(vote(1, digest="e"), sketch=other.digits)
    with pytest.raises(SaveFailed, match=said):
        cast([vote(0), dissent, vote(2)], world_size=3).collect(own)


# Waiting for rank 0


def test_a_rank_0_that_never_opens_or_decides_is_named() -> None:
    _, second = ballots(2, timeout_s=0.2)
    with pytest.raises(SaveTimeout, match="rank 1 waited 0 s for rank 0 to create the directory") as caught:
        second.await_open()
    assert caught.value.rank == 0


def test_a_rank_0_that_is_gone_is_said_to_be_gone() -> None:
    first, second = meetings(2)
    ballot = Ballot(second, step=5, path=PATH, timeout_s=30)
    first.leave()
    ballot.acknowledge()  # which nobody waits for any more
    for call in (ballot.await_open, ballot.await_verdict, ballot.await_aftermath):
        with pytest.raises(SaveFailed, match="rank 0's process, which holds the store, cannot be reached") as caught:
            call()
        assert (caught.value.rank, caught.value.step) == (0, 5)


# Who acknowledges, and what is forgotten


def test_rank_0_leaves_only_when_those_that_voted_know() -> None:
    all_ballots = ballots(3, timeout_s=0.2)
    assert not all_ballots[0].await_acknowledged(0)
    for rank in (0, 1):
        all_ballots[rank].cast(vote(rank))
    with pytest.raises(SaveTimeout, match="rank 2 did not report"):
        all_ballots[0].collect()
    all_ballots[0].acknowledge()
    assert not all_ballots[0].await_acknowledged(0)
    all_ballots[1].acknowledge()
    assert all_ballots[0].await_acknowledged(0)  # rank 2, which never came, is not waited for


def test_what_is_forgotten_is_gone_from_the_store() -> None:
    (meeting,) = meetings(1)
    ballot = Ballot(meeting, step=5, path=PATH, timeout_s=30)
    ballot.open(None)
    ballot.decide(None)
    ballot.conclude(Aftermath(trouble=None, steps={}))
    ballot.acknowledge()
    keys = [f"stillframe/{ballot.attempt}/{name}" for name in ("open", "verdict", "aftermath", "seen")]
    assert [meeting.store.has(key) for key in keys] == [True] * 4
    ballot.forget()
    assert [meeting.store.has(key) for key in keys] == [False] * 4


# Keeping in step


def test_attempts_are_numbered_alike_and_named_by_nonce_and_number() -> None:
    first, second = ballots(2)
    for number in range(3):
        assert first.attempt == second.attempt == f"{NONCE}.{number}"
        first.open(None)
        second.await_open()
        first, second = (ballot.successor(step=5, path=PATH) for ballot in (first, second))


def test_an_attempt_that_was_never_opened_does_not_count() -> None:
    first, second = ballots(2, timeout_s=0.2)
    with pytest.raises(SaveTimeout):
        second.await_open()
    second = second.successor(step=6, path=PATH)
    assert second.attempt == first.attempt


@pytest.mark.parametrize("how", ["late", "no room"])
def test_a_rank_that_skipped_a_save_joins_the_next_one(how: str) -> None:
    first, second = ballots(2, timeout_s=0.2)
    if how == "late":
        first.open(None)
        first.cast(vote(0))
        with pytest.raises(SaveTimeout) as caught:
            first.collect()
        first.decide(Failure.of(caught.value, rank=0, stage="vote"))
    else:
        first.open(replace(DISK_FULL, rank=0))
    first = first.successor(step=6, path=PATH)
    second = Ballot(second._meeting, step=6, path=PATH, timeout_s=30, number=0)
    first.open(None)
    second.await_open()
    assert second.attempt == first.attempt
    second.cast(vote(1, step=6))
    first.cast(vote(0, step=6))
    assert len(first.collect()) == 2


def test_a_rank_that_was_late_hears_how_its_save_ended() -> None:
    first, second = ballots(2, timeout_s=0.2)
    first.open(None)
    late = SaveTimeout("rank 1 did not report", step=5, rank=1, stage="vote", path=PATH)
    first.decide(Failure.of(late, rank=0, stage="vote"))
    second.await_open()
    second.cast(vote(1))
    with pytest.raises(SaveTimeout, match="rank 1 did not report"):
        second.await_verdict()
    assert second.successor(step=6, path=PATH).attempt == first.successor(step=6, path=PATH).attempt


def test_ranks_that_save_different_steps_all_learn_it() -> None:
    first, second = ballots(2)
    third = Ballot(second._meeting, step=6, path=Path("/run/hf-6"), timeout_s=30)

    def rank_0() -> Any:
        first.open(None)
        first.cast(vote(0))
        return first.collect()

    outcomes = on_ranks(rank_0, third.await_open)
    for outcome in outcomes:
        assert isinstance(outcome, SaveFailed)
        assert outcome.rank == 1
        assert "rank 1 saves step 6 while rank 0 saves step 5" in str(outcome)
    assert third.successor(step=7, path=PATH).attempt == first.successor(step=7, path=PATH).attempt


def test_a_rank_with_another_layout_learns_it_before_it_writes() -> None:
    first, second, third = ballots(3)

    def rank_0() -> Any:
        first.open(None, layout_digest="d")
        first.cast(vote(0))
        return first.collect(Sketch.of([("a", "2 rows"), ("b", "3 rows")]))

    def rank_2() -> Any:
        third.await_open(layout_digest="d")
        third.cast(vote(2))
        return "may write"

    other = Sketch.of([("a", "2 rows"), ("b", "4 rows")])
    outcomes = on_ranks(rank_0, lambda: second.await_open(layout_digest="e", sketch=other), rank_2)
    said = str(outcomes[0])
    assert "The first tensor that they describe differently: b" in said
    assert outcomes[2] == "may write"
    for outcome in outcomes[:2]:
        assert isinstance(outcome, SaveFailed)
        assert outcome.rank == 1
        assert "rank 1 has another layout than rank 0" in str(outcome)
