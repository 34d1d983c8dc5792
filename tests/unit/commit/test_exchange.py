"""Texts exchanged through the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from stillframe.commit.exchange import Exchange, Exchanged
from stillframe.commit.rendezvous import Rendezvous
from stillframe.commit.store import BoundedStore
from stillframe.errors import SaveTimeout, StillframeError, UnsupportedModel


def exchanges(tmp_path: Path, count: int, timeout_s: float = 60) -> list[Exchange]:
    # As in a job: one rank serves the store, the others are its clients.
    served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    joined = [TCPStore("127.0.0.1", served.port, wait_for_workers=False) for _ in range(1, count)]
    stores = [BoundedStore(store, remote=False, answer_timeout_s=60) for store in (served, *joined)]
    meetings = [Rendezvous(rank=r, world_size=count, nonce="n", store=s) for r, s in enumerate(stores)]
    return [Exchange(meeting, run_dir=tmp_path, timeout_s=timeout_s) for meeting in meetings]


def outcome(exchange: Exchange, text: str | Exception) -> Exchanged | StillframeError:
    try:
        return exchange.exchange(text)
    except StillframeError as error:
        return error


def test_every_rank_gets_the_different_texts_and_who_has_which(tmp_path: Path) -> None:
    ranks = exchanges(tmp_path, 4)
    with ThreadPoolExecutor(4) as pool:
        for texts in ("abab", "xxxx"):
            found = list(pool.map(outcome, ranks, texts))
            expected = {t: tuple(r for r in range(4) if texts[r] == t) for t in dict.fromkeys(texts)}
            assert found == [Exchanged(texts=tuple(expected), ranks=tuple(expected.values()))] * 4


def test_what_keeps_a_rank_from_its_text_is_raised_on_all(tmp_path: Path) -> None:
    ranks = exchanges(tmp_path, 3)
    error = UnsupportedModel("w: is odd")
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(outcome, ranks, ["a", error, "a"]))
    assert [type(one) for one in found] == [UnsupportedModel] * 3
    assert [str(one) for one in found] == ["rank 1: w: is odd", "w: is odd", "rank 1: w: is odd"]


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_will_not_come_excuses_itself(tmp_path: Path, absent: int) -> None:
    ranks = exchanges(tmp_path, 3)
    ranks[absent].excuse(UnsupportedModel("no module"))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(outcome, [r for n, r in enumerate(ranks) if n != absent], ["a", "a"]))
    assert [str(one) for one in found] == [f"rank {absent}: no module"] * 2


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    ranks = exchanges(tmp_path, 3, timeout_s=0.2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(outcome, ranks[:2], ["a", "a"]))
    assert [type(one) for one in found] == [SaveTimeout] * 2
    assert all("rank 2 did not say within 0 s which tensors they hold" in str(one) for one in found)
