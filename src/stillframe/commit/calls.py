"""Calls of torch's stores that are under way on other threads when the interpreter ends.

Before 3.14, Python ends a daemon thread that comes back from such a call meanwhile by unwinding it, through frames of
C++ that may not be unwound: the process dies of SIGABRT ("terminate called without an active exception"), whatever its
status was to be (https://github.com/python/cpython/issues/87135). A training that fails while its save waits for other
ranks meets that if they end too, which breaks the connection. So these calls are made to return before the interpreter
ends: their connections are hung up. Their callers learn nothing of it; the threads stand still until they are no more.
"""

from __future__ import annotations

import atexit
import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Public and documented, but re-exported without an `__all__`.
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

_RETURN_S = 2.0


class Calls:
    """The calls of stores that are under way in this process."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """A forked process has none of the threads, and the connections are not its to hang up."""
        self._changed = threading.Condition()
        self._stores: dict[int, Store] = {}  # by the thread that calls
        self._ending = False

    @contextmanager
    def calling(self, store: Store) -> Iterator[None]:
        """Around one call. Once the interpreter ends, a thread other than the main one begins none, and does not come
        out of one."""
        thread = threading.get_ident()
        with self._changed:
            ending = self._ending
            if not ending:
                self._stores[thread] = store
        if ending:
            _stand_still()
        try:
            yield
        finally:
            with self._changed:
                self._stores.pop(thread, None)
                self._changed.notify_all()
                ending = self._ending
            if ending:
                _stand_still()

    def end(self) -> None:
        """Have all calls of other threads return; waits until they have, at most 2 s."""
        with self._changed:
            self._ending = True
            served = [store for store in self._stores.values() if isinstance(store, TCPStore)]
            if served:
                with _silent_stderr():
                    for store in served:
                        _hang_up(store)
                    self._changed.wait_for(lambda: not self._stores, _RETURN_S)


def _stand_still() -> None:
    """For a thread other than the main one, until it is no more: in a wait that Python can end."""
    if threading.current_thread() is not threading.main_thread():
        threading.Event().wait()


def _hang_up(store: TCPStore) -> None:
    """End the connections of this process to that store; torch has no call for it."""
    try:
        found = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_STREAM)
    except OSError:
        return
    addresses = {_plain(str(address[0])) for *_, address in found}
    for link in Path("/proc/self/fd").iterdir():
        # OSError: it is no socket, or not connected, or closed meanwhile.
        with suppress(OSError), socket.socket(fileno=os.dup(int(link.name))) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            peer, port = connection.getpeername()[:2]
            if port == store.port and _plain(peer) in addresses:
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """For the moment in which torch would print its stacks for a connection that we have ended ourselves, as the last
    words of a process that ends for another reason."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    kept_fd = os.dup(2)
    null_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null_fd, 2)
    try:
        yield
    finally:
        os.dup2(kept_fd, 2)
        os.close(null_fd)
        os.close(kept_fd)


def _plain(address: str) -> str:
    """An IPv4 address that is written as one of IPv6 as what it is."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


CALLS = Calls()
atexit.register(CALLS.end)
os.register_at_fork(after_in_child=CALLS.forget)
