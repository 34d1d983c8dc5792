"""Ranks as threads of one process, with a real store between them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from stillframe.commit.rendezvous import Rendezvous
from stillframe.commit.store import BoundedStore
from stillframe.commit.vote import Ballot

NONCE = "0123456789abcdef"
PATH = Path("/run/hf-5")


def serve() -> TCPStore:
    """A store that this process serves, on a port of the kernel's choice."""
    # Handing over a socket that listens: left to itself, a TCPStore takes 5 s once in a while (torch 2.13).
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())


def meetings(world_size: int, *, answer_timeout_s: float = 30.0) -> list[Rendezvous]:
    """One for each rank; rank 0's serves the store."""
    served = serve()
    stores = [BoundedStore(served, remote=False, answer_timeout_s=answer_timeout_s)]
    for _ in range(1, world_size):
        client = TCPStore("127.0.0.1", served.port, None, False, wait_for_workers=False)
        stores.append(BoundedStore(client, remote=True, answer_timeout_s=answer_timeout_s))
    return [Rendezvous(rank=r, world_size=world_size, nonce=NONCE, store=store) for r, store in enumerate(stores)]


def ballots(world_size: int, *, step: int | None = 5, timeout_s: float = 30.0) -> list[Ballot]:
    """The first ballot of each rank of one new job."""
    return [Ballot(meeting, step=step, path=PATH, timeout_s=timeout_s) for meeting in meetings(world_size)]


def on_ranks(*parts: Callable[[], Any]) -> list[Any]:
    """Run each rank's part on a thread of its own; what each returned, or the exception that it raised."""
    outcomes: list[Any] = [None] * len(parts)

    def run(rank: int) -> None:
        try:
            outcomes[rank] = parts[rank]()
        except Exception as error:  # noqa: BLE001  # it is the outcome
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcomes
