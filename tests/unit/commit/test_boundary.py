"""Agreeing on a boundary: every order of events that is possible in a small job, and some in larger ones."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.commit.boundary import Chair, Message, Post, Seat


@dataclass
class Training:
    """One rank: the steps it has done, the boundaries at which it was told to go on, and where it acted."""

    seat: Seat
    done: int = 0
    waits: bool = False
    went_on: int = 0
    acted_at: int | None = None
    left: bool = False
    may_call: bool = False
    inbox: deque[Message] = field(default_factory=deque)


class Job:
    """Ranks that take `steps` steps and then leave. `lockstep`: each step has a collective, which all must reach."""

    def __init__(self, world_size: int, steps: int, *, callers: set[int], lockstep: bool) -> None:
        self.ranks = [Training(Seat(rank), may_call=rank in callers) for rank in range(world_size)]
        self.chair = Chair(world_size)
        self.steps = steps
        self.lockstep = lockstep

    def possible(self) -> list[tuple[str, int]]:
        """Everything that may happen next."""
        events = []
        for number, rank in enumerate(self.ranks):
            if rank.inbox and not self.is_deaf(number):
                events.append(("hears", number))
            if rank.left:
                continue
            if rank.may_call:
                events.append(("calls", number))
            if rank.acted_at is not None or (rank.done == self.steps and not rank.waits):
                events.append(("leaves", number))
            elif rank.waits:
                if rank.seat.decision is not None:
                    events.append(("is answered", number))
            elif not self.lockstep or all(other.went_on >= rank.done for other in self.ranks):
                events.append(("steps", number))
        return events

    def is_deaf(self, number: int) -> bool:
        return self.ranks[number].left and (number != 0 or self.chair.is_over)

    def happens(self, event: str, number: int) -> None:
        rank = self.ranks[number]
        if event == "hears":
            message = rank.inbox.popleft()
            to_seat = message["kind"] in ("called", "decided")
            self.post(rank.seat.told(message) if to_seat else self.chair.told(message))
        elif event == "calls":
            rank.may_call = False
            self.post([(0, {"kind": "call", "why": "SIGTERM"})])
        elif event == "leaves":
            rank.left = True
            self.post([(0, {"kind": "left", "rank": number, "failure": None})])
        else:
            rank.done += event == "steps"
            answer = rank.seat.passes(rank.done)
            rank.waits = answer is None
            if answer is False:
                rank.went_on = rank.done
            elif answer:
                rank.acted_at = rank.done

    def post(self, post: Post) -> None:
        for receiver, message in post:
            self.ranks[receiver].inbox.append(message)

    def check(self) -> None:
        """Whoever acts, acts where the others can yet act, too."""
        acted = {rank.acted_at for rank in self.ranks if rank.acted_at is not None}
        assert len(acted) <= 1
        for step in acted:
            assert all(rank.went_on < step for rank in self.ranks)

    def check_end(self) -> None:
        """Nothing can happen any more: nobody waits, and all have acted or none."""
        self.check()
        assert all(rank.left for rank in self.ranks)
        assert len({rank.acted_at for rank in self.ranks}) == 1
        assert self.chair.is_over

    def state(self) -> Any:
        chair = tuple(repr(value) for value in vars(self.chair).values())
        return chair, tuple(
            (r.done, r.waits, r.went_on, r.acted_at, r.left, r.may_call, r.seat.called, r.seat.decision, repr(r.inbox))
            for r in self.ranks
        )


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize(("world_size", "steps", "callers"), [(1, 2, {0}), (2, 2, {0}), (2, 2, {1}), (2, 1, {0, 1})])
def test_in_every_order_all_act_at_one_step_or_none_does(
    world_size: int, steps: int, callers: set[int], lockstep: bool
) -> None:
    begin = Job(world_size, steps, callers=callers, lockstep=lockstep)
    seen = {begin.state()}
    ahead = [begin]
    ends = set()
    while ahead:
        job = ahead.pop()
        events = job.possible()
        if not events:
            job.check_end()
            ends.add(job.ranks[0].acted_at)
        for event in events:
            after = copy.deepcopy(job)
            after.happens(*event)
            after.check()
            if after.state() not in seen:
                seen.add(after.state())
                ahead.append(after)
    # Called before the first step or later, also too late.
    assert ends == {None, *range(1, steps + 1)}


@given(st.integers(2, 5), st.integers(1, 6), st.booleans(), st.data())
def test_of_more_ranks_too_all_act_at_one_step_or_none_does(
    world_size: int, steps: int, lockstep: bool, data: st.DataObject
) -> None:
    callers = data.draw(st.sets(st.integers(0, world_size - 1), min_size=1))
    job = Job(world_size, steps, callers=callers, lockstep=lockstep)
    while events := job.possible():
        job.happens(*data.draw(st.sampled_from(events)))
        job.check()
    job.check_end()


def test_steps_need_not_begin_at_1_nor_follow_each_other() -> None:
    first, second = Seat(0), Seat(1)
    assert [first.passes(510), second.passes(510), second.passes(520)] == [False, False, False]
    chair = Chair(2)
    (of_first, to_first), (of_second, to_second) = chair.told({"kind": "call", "why": ""})
    assert (of_first, of_second) == (0, 1)
    ((_, answer_of_first),), ((_, answer_of_second),) = first.told(to_first), second.told(to_second)
    assert first.passes(520) is None
    assert chair.told(answer_of_first) == []
    for (_, message), seat in zip(chair.told(answer_of_second), (first, second), strict=True):
        seat.told(message)
    assert [first.passes(520), first.passes(530), second.passes(530)] == [False, True, True]
