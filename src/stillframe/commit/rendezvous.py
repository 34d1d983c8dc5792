"""How the ranks of a job find each other's votes: a store of stillframe's own.

Not the job's process groups: their collectives would have to run on the training thread, and one that fails or
hangs takes the training with it. A store's wait is bounded, fails alone, and needs no matching call on other ranks.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

# Public and documented, but re-exported without an `__all__`.
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from stillframe.commit.failure import Failure, in_words
from stillframe.commit.store import BoundedStore, within
from stillframe.errors import RunDirectoryError, SaveFailed, SaveTimeout, StillframeError

_LONGEST_CONNECT_S = 120.0
_LONGEST_ANSWER_S = 60.0
_SHORTEST_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """This rank, the job's size, the store, and a random `nonce` of this Checkpointer (equal on all ranks).

    The store runs in rank 0's process; for a job of one rank it stays in the process altogether.
    """

    rank: int
    world_size: int
    nonce: str
    store: BoundedStore

    def leave(self) -> None:
        """Let go of the store; rank 0's listens no more from then on. The last thing done with it."""
        self.store.close()


def meet(run_dir: Path, *, store_host: str | None, timeout_s: float) -> Rendezvous:
    """All ranks of the default process group meet once; every rank calls this. Blocks, a few times `timeout_s` at most.

    The ranks talk through the store that they met in for `torch.distributed` itself. Rank 0 creates `run_dir` where it
    is missing, listens on a port that the kernel chooses, and tells the others where: on loopback when all ranks share
    a host, else on `store_host`, else on MASTER_ADDR's address where that is this host's, else on the address of this
    host's name. Raises, on every rank alike, RunDirectoryError, StillframeError if a rank cannot reach that address,
    or SaveTimeout naming the ranks that did not call.
    """
    if not (dist.is_available() and dist.is_initialized()):
        _create(run_dir)
        store = BoundedStore(HashStore(), remote=False, answer_timeout_s=_LONGEST_ANSWER_S)
        return Rendezvous(rank=0, world_size=1, nonce=secrets.token_hex(8), store=store)
    waits = _Waits.within(timeout_s)
    first = BoundedStore(_get_default_store(), remote=True, answer_timeout_s=waits.answer_s)
    introduction = _Introduction(first, dist.get_rank(), dist.get_world_size(), run_dir)
    return _host(introduction, store_host, waits) if introduction.rank == 0 else _join(introduction, waits)


def meeting_of_the_job(what: str, *, path: Path, timeout_s: float) -> Rendezvous:
    """All ranks of the default process group in the store that they met in for `torch.distributed` itself, without a
    wait for each other: for a word or two about `path`. The n-th such meetings of all ranks for the same `what` are
    one. Raises SaveFailed where the store cannot be reached."""
    if not (dist.is_available() and dist.is_initialized()):
        alone = BoundedStore(HashStore(), remote=False, answer_timeout_s=_LONGEST_ANSWER_S)
        return Rendezvous(rank=0, world_size=1, nonce=what, store=alone)
    waits = _Waits.within(timeout_s)
    store = BoundedStore(_get_default_store(), remote=True, answer_timeout_s=waits.answer_s)
    try:
        number = store.add(f"stillframe/{what}-of-{dist.get_rank()}", 1)
    except ConnectionError as error:
        reason = f"the store of the default process group cannot be reached ({error})"
        raise SaveFailed(reason, step=None, rank=None, stage="prepare", path=path) from error
    return Rendezvous(rank=dist.get_rank(), world_size=dist.get_world_size(), nonce=f"{what}-{number}", store=store)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waits:
    """How long the steps of a meeting may take. Each step's bound is beyond what the steps it waits for may take."""

    come_s: float
    connect_s: float
    answer_s: float

    @staticmethod
    def within(timeout_s: float) -> _Waits:
        answer_s = min(_LONGEST_ANSWER_S, max(_SHORTEST_ANSWER_S, timeout_s))
        return _Waits(come_s=timeout_s, connect_s=min(_LONGEST_CONNECT_S, timeout_s), answer_s=answer_s)

    @property
    def offer_s(self) -> float:
        return self.come_s + self.answer_s

    @property
    def joined_s(self) -> float:
        return self.connect_s + 2 * self.answer_s

    @property
    def start_s(self) -> float:
        return self.joined_s + self.answer_s


def _host(introduction: _Introduction, store_host: str | None, waits: _Waits) -> Rendezvous:
    """Rank 0's part of `meet`."""
    nonce = secrets.token_hex(8)
    with introduction.telling_all("offer"):
        identities = introduction.collect("identity", _network_identity(), waits.come_s)
        _create(introduction.run_dir)
        one_host = all(identity == identities[0] for identity in identities)
        listener = _listen("127.0.0.1" if one_host else store_host)
        host, port = listener.getsockname()[:2]
        # The store's own process cannot be silent while it waits for an answer.
        served = _tcp_store(host, port, listener, waits.connect_s)
        store = BoundedStore(served, remote=False, answer_timeout_s=waits.answer_s)
        introduction.announce("offer", {"host": host, "port": port, "nonce": nonce})
    with introduction.telling_all("start"):
        try:
            for failure in introduction.collect("joined", None, waits.joined_s):
                if failure is not None:
                    raise Failure(**failure).exception(step=None, path=introduction.run_dir)
        except BaseException:
            store.close()
            raise
        introduction.announce("start", {})
    return Rendezvous(rank=0, world_size=introduction.world_size, nonce=nonce, store=store)


def _join(introduction: _Introduction, waits: _Waits) -> Rendezvous:
    """The part of the other ranks."""
    introduction.report("identity", _network_identity())
    try:
        offer = introduction.hear("offer", waits.offer_s)
    except SaveTimeout as error:
        # Rank 0 need not wait for us, should it come yet.
        introduction.report("joined", asdict(Failure.of(error, rank=introduction.rank, stage="start")))
        raise
    host, port = offer["host"], offer["port"]
    connected: TCPStore | None = None
    failure: Failure | None = None
    try:
        connected = within(waits.connect_s + waits.answer_s, lambda: _tcp_store(host, port, None, waits.connect_s))
    except (ConnectionError, TimeoutError, RuntimeError) as error:
        reason = (
            f"rank {introduction.rank} cannot reach rank 0's store at {host}:{port} ({error}); "
            "pass store_host, an address of rank 0's host that all ranks reach"
        )
        failure = Failure(error="StillframeError", rank=introduction.rank, stage="start", reason=reason)
    introduction.report("joined", None if failure is None else asdict(failure))
    introduction.hear("start", waits.start_s)
    assert connected is not None, "rank 0 announces what was reported as a failure"
    store = BoundedStore(connected, remote=True, answer_timeout_s=waits.answer_s)
    return Rendezvous(rank=introduction.rank, world_size=introduction.world_size, nonce=offer["nonce"], store=store)


class _Introduction:
    """The talk by which the ranks of one meeting find each other, in the default process group's own store."""

    def __init__(self, store: BoundedStore, rank: int, world_size: int, run_dir: Path) -> None:
        self.rank = rank
        self.world_size = world_size
        self.run_dir = run_dir
        self._store = store
        with self._reaching_the_store():
            # Counted per rank, in the store itself: the same meeting has the same number on all ranks.
            self._number = store.add(f"stillframe/meetings-of-{rank}", 1)

    def report(self, name: str, message: Any) -> None:
        """This rank's own word, for rank 0."""
        with self._reaching_the_store():
            self._store.set(self._key(f"{name}/{self.rank}"), json.dumps(message))

    def collect(self, name: str, own: Any, timeout_s: float) -> list[Any]:
        """Rank 0: what each rank reported, by rank. Raises SaveTimeout naming those that did not."""
        found: list[Any] = [own]
        deadline = time.monotonic() + timeout_s
        with self._reaching_the_store():
            for rank in range(1, self.world_size):
                try:
                    text = self._store.get(self._key(f"{name}/{rank}"), deadline - time.monotonic())
                except TimeoutError as error:
                    raise self._late(name, rank, timeout_s) from error
                found.append(json.loads(text))
        return found

    def announce(self, name: str, message: dict[str, Any]) -> None:
        """Rank 0: for every rank."""
        with self._reaching_the_store():
            self._store.set(self._key(name), json.dumps(message))

    def hear(self, name: str, timeout_s: float) -> dict[str, Any]:
        """What rank 0 announced. Raises what it announced as a failure, or SaveTimeout."""
        with self._reaching_the_store():
            try:
                message: dict[str, Any] = json.loads(self._store.get(self._key(name), timeout_s))
            except TimeoutError as error:
                reason = f"rank {self.rank} waited {timeout_s:.0f} s for rank 0: did it make its Checkpointer?"
                raise SaveTimeout(reason, step=None, rank=0, stage="start", path=self.run_dir) from error
        if "failure" in message:
            raise Failure(**message["failure"]).exception(step=None, path=self.run_dir)
        return message

    @contextmanager
    def telling_all(self, name: str) -> Iterator[None]:
        """Rank 0: whatever is raised inside is what the others hear as `name`."""
        try:
            yield
        except (StillframeError, OSError, RuntimeError) as error:
            self.announce(name, {"failure": asdict(Failure.of(error, rank=0, stage="start"))})
            raise

    def _late(self, name: str, first: int, timeout_s: float) -> SaveTimeout:
        others = range(first + 1, self.world_size)
        late = [first, *(rank for rank in others if not self._store.has(self._key(f"{name}/{rank}")))]
        reason = (
            f"{in_words(late)} did not come within {timeout_s:.0f} s (of {self.world_size} ranks); "
            "does every rank make a Checkpointer?"
        )
        return SaveTimeout(reason, step=None, rank=first, stage="start", path=self.run_dir)

    def _key(self, name: str) -> str:
        return f"stillframe/meeting-{self._number}/{name}"

    @contextmanager
    def _reaching_the_store(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            reason = f"the store of the default process group cannot be reached ({error})"
            raise SaveFailed(reason, step=None, rank=None, stage="start", path=self.run_dir) from error


def _create(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file, not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise RunDirectoryError(f"cannot create the run directory {run_dir}: {reason}") from error


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


def _tcp_store(host: str, port: int, listener: socket.socket | None, timeout_s: float) -> TCPStore:
    """A client of the store at `host:port`; with `listener`, the store itself (which takes the socket over)."""
    timeout = timedelta(seconds=timeout_s)
    if listener is None:
        return TCPStore(host, port, None, False, timeout=timeout, wait_for_workers=False)
    return TCPStore(host, port, None, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach())
