"""The bounded store: every call ends, also when the process that serves it is stopped or killed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed import FileStore, HashStore, TCPStore

from stillframe.commit.store import BoundedStore, within
from stillframe.testing import Ranks, hold_at
from tests.multirank.held_writers import wait_until_stopped
from tests.unit.commit.meetings import serve


@pytest.fixture(params=["hash", "file", "tcp", "tcp from afar"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BoundedStore:
    if request.param == "hash":
        return BoundedStore(HashStore(), remote=False, answer_timeout_s=30)
    if request.param == "file":
        return BoundedStore(FileStore(str(tmp_path / "store"), 1), remote=False, answer_timeout_s=30)
    return BoundedStore(serve(), remote=request.param == "tcp from afar", answer_timeout_s=30)


def test_what_is_set_is_there(store: BoundedStore) -> None:
    assert not store.has("key")
    store.set("key", "täxt")
    assert store.has("key")
    assert store.get("key", 0) == "täxt"
    assert [store.add("number", amount) for amount in (1, 2, 0)] == [1, 3, 3]
    store.delete("key")
    assert not store.has("key")


def test_a_wait_in_vain_ends(store: BoundedStore) -> None:
    for timeout_s in (0.1, 0, -1):
        with pytest.raises(TimeoutError):
            store.get("nobody sets this", timeout_s)
    store.set("key", "text")
    assert store.get("key", 30) == "text"


@pytest.mark.parametrize("remote", [False, True])
def test_a_queue_keeps_its_order(remote: bool) -> None:
    store = BoundedStore(serve(), remote=remote, answer_timeout_s=30)
    for text in ("one", "two"):
        store.push("queue", text)
    assert [store.pop("queue", 30) for _ in range(2)] == ["one", "two"]
    for timeout_s in (0.1, 0, -1):
        with pytest.raises(TimeoutError):
            store.pop("queue", timeout_s)
    store.push("queue", "three")
    assert store.pop("queue", 0) == "three"


def test_a_store_that_was_closed_is_of_no_more_use(store: BoundedStore) -> None:
    store.close()
    with pytest.raises(ConnectionError, match="given up"):
        store.get("key", 30)
    store.close()


def serve_until_released(port_path: Path) -> None:
    store = serve()
    port_path.write_text(str(store.port))
    hold_at("serving")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Ranks[None]]:
    with Ranks(1, serve_until_released, tmp_path / "port", backend=None) as ranks:
        ranks.wait_reached("serving", rank=0)
        yield ranks


CALLS: dict[str, Callable[[BoundedStore], object]] = {
    "get": lambda store: store.get("key", 0.1),
    "pop": lambda store: store.pop("queue", 0.1),
    "add": lambda store: store.add("number", 1),
    "has": lambda store: store.has("key"),
    "delete": lambda store: store.delete("key"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("signum", [signal.SIGSTOP, signal.SIGKILL])
def test_a_server_that_is_stopped_or_killed_keeps_nobody_waiting(
    server: Ranks[None], tmp_path: Path, call: Callable[[BoundedStore], object], signum: signal.Signals
) -> None:
    client = TCPStore("127.0.0.1", int((tmp_path / "port").read_text()), None, False, wait_for_workers=False)
    store = BoundedStore(client, remote=True, answer_timeout_s=0.5)
    store.set("key before", "text")
    server.send_signal(0, signum)
    if signum == signal.SIGSTOP:
        wait_until_stopped(server.pids[0])
    with pytest.raises(ConnectionError):
        call(store)
    # Not even the next one waits, for a call that was left behind holds the connection.
    with pytest.raises(ConnectionError, match="given up"):
        call(store)


def test_what_is_raised_inside_is_raised() -> None:
    def fail() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        within(30, fail)
    assert within(30, lambda: 7) == 7
