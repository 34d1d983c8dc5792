"""A torch store in which no call waits for ever.

A TCPStore's own timeouts bound how long its server lets a call wait for a key. They do not help where the server itself
says nothing, because its process is stopped or its host unreachable: then each call blocks until the connection breaks,
which can take hours. Seen with torch 2.13, `wait` with a timeout included.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

# Public and documented, but re-exported without an `__all__`.
from torch.distributed import Store  # type: ignore[attr-defined]

from stillframe.commit.calls import CALLS

T = TypeVar("T")

_SHORTEST_WAIT_S = 0.001
_CONNECT_S = 60.0
"""torch asks for the name of the address that it connects to, for its messages. Where no DNS server answers that, it
takes what the resolver allows: by default 5 s for each of two tries (seen with torch 2.13: 5 s for one lost packet)."""


class BoundedStore:
    """Keys and texts that the ranks share; for one thread at a time.

    Raises TimeoutError where a key was not there in time, and ConnectionError where the process that serves the store
    is gone, or gave no answer `answer_timeout_s` after it should have. After the latter the store is of no more use.
    """

    def __init__(self, store: Store, *, remote: bool, answer_timeout_s: float) -> None:
        """`remote`: another process serves the store, so that it may fall silent while this one runs."""
        self._store: Store | None = store
        self._remote = remote
        self._answer_timeout_s = answer_timeout_s

    def set(self, key: str, text: str) -> None:
        self._ask(lambda store: store.set(key, text), 0)

    def get(self, key: str, timeout_s: float) -> str:
        """The key's text; waits until it is set."""

        def wait_and_get(store: Store) -> str:
            store.wait([key], timedelta(seconds=max(timeout_s, _SHORTEST_WAIT_S)))
            text: str = store.get(key).decode()
            return text

        return self._ask(wait_and_get, timeout_s)

    def has(self, key: str) -> bool:
        return self._ask(lambda store: bool(store.check([key])), 0)

    def add(self, key: str, amount: int) -> int:
        """Add to a number that starts at 0, and return the sum."""
        return self._ask(lambda store: int(store.add(key, amount)), 0)

    def delete(self, key: str) -> None:
        self._ask(lambda store: store.delete_key(key), 0)

    def push(self, key: str, text: str) -> None:
        """Append to the queue of that name."""
        self._ask(lambda store: store.queue_push(key, text), 0)

    def pop(self, key: str, timeout_s: float) -> str:
        """Take the oldest text of the queue; waits until there is one."""

        def pop(store: Store) -> str:
            store.set_timeout(timedelta(seconds=max(timeout_s, _SHORTEST_WAIT_S)))
            text: str = store.queue_pop(key).decode()
            return text

        return self._ask(pop, timeout_s)

    def another(self, *, answer_timeout_s: float) -> BoundedStore:
        """The same keys, for another thread: a connection of its own, so that no wait of the one holds up the other."""
        # A method of every store, of which torch's stubs do not know.
        clone: Store = self._ask(lambda store: store.clone(), _CONNECT_S)  # type: ignore[attr-defined]
        return BoundedStore(clone, remote=self._remote, answer_timeout_s=answer_timeout_s)

    def close(self) -> None:
        """Let go of the store; one that this process serves ends with its last holder."""
        self._store = None

    def _ask(self, operation: Callable[[Store], T], timeout_s: float) -> T:
        store = self._store
        if store is None:
            raise ConnectionError("the connection was given up")

        def call() -> T:
            with CALLS.calling(store):
                return operation(store)

        if not self._remote:
            with _translated():
                return call()
        try:
            return within(timeout_s + self._answer_timeout_s, call)
        except ConnectionError:
            self._store = None  # a call that was left behind would hold up the next one
            raise


def within(timeout_s: float, operation: Callable[[], T]) -> T:
    """The result of `operation`, which may call a torch store, or ConnectionError if it does not return in time.

    It runs on a thread that is left behind then: nothing ends a call that a store's server does not answer.
    """
    answer: futures.Future[T] = futures.Future()

    def call() -> None:
        try:
            with _translated():
                answer.set_result(operation())
        except BaseException as error:  # noqa: BLE001  # raised by the caller
            answer.set_exception(error)

    threading.Thread(target=call, name="stillframe-store", daemon=True).start()
    if not futures.wait([answer], timeout_s).done:
        raise ConnectionError(f"no answer within {timeout_s:.0f} s: it is stopped, or its host cannot be reached")
    return answer.result()


@contextmanager
def _translated() -> Iterator[None]:
    """torch's exceptions as Python's. `FileStore` says by a plain RuntimeError that it waited in vain."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise ConnectionError(str(error).partition("\n")[0]) from error
    except RuntimeError as error:
        if isinstance(error, dist.DistStoreError) or "timeout" in str(error).lower():
            raise TimeoutError(str(error).partition("\n")[0]) from error
        raise
