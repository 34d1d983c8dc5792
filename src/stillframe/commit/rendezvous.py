"""How the ranks of a job find each other's votes: a store of stillframe's own.

Not the job's process groups: their collectives would have to run on the training thread, and one that fails or
hangs takes the training with it. A TCPStore wait is bounded, fails alone, and needs no matching call on other ranks.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

# Public and documented, but re-exported without an `__all__`.
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from stillframe.errors import RunDirectoryError, StillframeError

_CONNECT_TIMEOUT_S = 120


@dataclass(slots=True, kw_only=True)
class Rendezvous:
    """This rank, the job's size, the store, and a random `nonce` of this Checkpointer (equal on all ranks).

    The store runs in rank 0's process. `HashStore`, which stays in the process, serves a job of one rank.
    """

    rank: int
    world_size: int
    nonce: str
    store: Store

    def leave(self) -> None:
        """Let go of the store; rank 0's listens no more from then on. The last thing done with it."""
        del self.store


def meet(run_dir: Path, *, store_host: str | None) -> Rendezvous:
    """Collective: all ranks of the default process group meet once, on the training thread, within its timeout.

    Rank 0 creates `run_dir` where it is missing, listens on a port that the kernel chooses, and tells the others where.
    It listens on loopback when all ranks share a host, else on `store_host`, else on MASTER_ADDR's address where that
    is this host's, else on the address of this host's name. Raises RunDirectoryError or StillframeError on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        _create(run_dir)
        return Rendezvous(rank=0, world_size=1, nonce=secrets.token_hex(8), store=HashStore())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hosts: list[object] = [None] * world_size
    dist.all_gather_object(hosts, _network_identity())
    one_host = all(host == hosts[0] for host in hosts)
    store: Store | None = None
    offer: list[tuple[str, int, str] | str] = [""]
    if rank == 0:
        try:
            _create(run_dir)
            listener = _listen("127.0.0.1" if one_host else store_host)
            host, port = listener.getsockname()[:2]
            store = _tcp_store(host, port, listener)
            offer = [(host, port, secrets.token_hex(8))]
        except (StillframeError, OSError, RuntimeError) as error:
            offer = [str(error)]
    dist.broadcast_object_list(offer, src=0)
    if isinstance(offer[0], str):
        raise RunDirectoryError(offer[0])
    host, port, nonce = offer[0]
    if store is None:
        try:
            store = _tcp_store(host, port, None)
        except RuntimeError as error:
            raise StillframeError(
                f"rank {rank} cannot reach rank 0's store at {host}:{port}: {error}; "
                "pass store_host, an address of rank 0's host that all ranks reach"
            ) from error
    return Rendezvous(rank=rank, world_size=world_size, nonce=nonce, store=store)


def _create(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot create the run directory {run_dir}: {error.strerror}") from error


def _network_identity() -> tuple[str, int]:
    """Equal for processes that reach each other by loopback: same running kernel, same network namespace."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path("/proc/self/ns/net").stat().st_ino


def _listen(host: str | None) -> socket.socket:
    candidates = [host] if host else [os.environ.get("MASTER_ADDR"), socket.gethostname()]
    problems = []
    for candidate in filter(None, candidates):
        try:
            family, _, _, _, address = socket.getaddrinfo(candidate, 0, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            problems.append(f"{candidate}: {error}")
            continue
        try:
            listener.bind(address)
            listener.listen(4096)
        except OSError as error:
            listener.close()
            problems.append(f"{candidate}: {error.strerror}")
        else:
            return listener
    raise StillframeError(
        f"rank 0 cannot listen on an address of its own ({'; '.join(problems)}); "
        "pass store_host, one that all ranks reach"
    )


def _tcp_store(host: str, port: int, listener: socket.socket | None) -> TCPStore:
    """A client of the store at `host:port`; with `listener`, the store itself (which takes the socket over)."""
    timeout = timedelta(seconds=_CONNECT_TIMEOUT_S)
    if listener is None:
        return TCPStore(host, port, None, False, timeout=timeout, wait_for_workers=False)
    return TCPStore(host, port, None, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach())
