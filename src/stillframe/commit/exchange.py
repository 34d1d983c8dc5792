"""What each rank says of itself, told to every rank, through the store: equal texts travel once.

For what is exchanged once in a while, such as which tensors the ranks of a pipeline hold. A job of 1,000 ranks in 8
stages posts 8 texts; beside them each rank sends and gets one short message.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillframe.commit.failure import Failure, in_words
from stillframe.commit.rendezvous import Rendezvous, meeting_of_the_job
from stillframe.errors import SaveFailed, SaveTimeout

_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """The different `texts`, by the lowest rank that posted each, and of each the ranks that did, ascending."""

    texts: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]


class Exchange:
    """Exchanges texts among the ranks of one meeting; every rank calls it as often as every other, one at a time."""

    def __init__(self, meeting: Rendezvous, *, run_dir: Path, timeout_s: float) -> None:
        self._meeting = meeting
        self._run_dir = run_dir
        self._timeout_s = timeout_s
        self._number = 0

    def exchange(self, text: str | Exception) -> Exchanged:
        """Post this rank's `text` and return those of all; instead of a text, what kept this rank from making one.

        Blocks until every rank has called it, bounded by the timeout. Raises, on every rank, the exception of the rank
        that had no text, or SaveTimeout naming the ranks that did not call.
        """
        self._number += 1
        with self._reaching_rank_0():
            store = self._meeting.store
            if isinstance(text, Exception):
                self._say("", self._failure(text))
            else:
                digest = hashlib.sha256(text.encode()).hexdigest()
                if store.add(self._key(f"posted/{digest}"), 1) == 1:
                    store.set(self._key(f"text/{digest}"), base64.b85encode(zlib.compress(text.encode())).decode())
                self._say(digest, None)
            if self._meeting.rank == 0:
                store.set(self._key("all"), json.dumps(self._collect()))
            told = self._get("all", self._timeout_s + _ANSWER_S)
            if told["failure"] is not None:
                if isinstance(text, Exception) and told["failure"]["rank"] == self._meeting.rank:
                    raise text
                raise Failure(**told["failure"]).exception(step=None, path=self._run_dir)
            return Exchanged(
                texts=tuple(self._text(digest) for digest in told["ranks"]),
                ranks=tuple(tuple(ranks) for ranks in told["ranks"].values()),
            )

    def excuse(self, error: Exception) -> None:
        """Tell the ranks in the first exchange, which this rank will not come to because of `error`; does not block."""
        if self._number > 0:
            return
        self._number = 1
        with self._reaching_rank_0():
            if self._meeting.rank == 0:
                self._meeting.store.set(self._key("all"), json.dumps({"failure": asdict(self._failure(error))}))
            else:
                self._say("", self._failure(error))

    def _failure(self, error: Exception) -> Failure:
        return Failure.of(error, rank=self._meeting.rank, stage="prepare")

    def _say(self, digest: str, failure: Failure | None) -> None:
        said = {"rank": self._meeting.rank, "digest": digest, "failure": None if failure is None else asdict(failure)}
        # In the order of arrival, so that the word of one that failed does not wait behind one that is late.
        number = self._meeting.store.add(self._key("arrivals"), 1)
        self._meeting.store.set(self._key(f"arrival/{number}"), json.dumps(said))

    def _collect(self) -> dict[str, Any]:
        """Rank 0: the ranks of each digest, or what is told to all instead."""
        digests: dict[int, str] = {}
        deadline = time.monotonic() + self._timeout_s
        while len(digests) < self._meeting.world_size:
            try:
                arrival = self._key(f"arrival/{len(digests) + 1}")
                said = json.loads(self._meeting.store.get(arrival, deadline - time.monotonic()))
            except TimeoutError:
                late = [rank for rank in range(self._meeting.world_size) if rank not in digests]
                reason = (
                    f"{in_words(late)} did not say within {self._timeout_s:.0f} s which tensors they hold; did every "
                    "rank make this call, with the same options? With pipeline=True these are the Checkpointer, "
                    "prepare, resume, the saves and load_hf, with broadcast=True load_hf"
                )
                return {"failure": asdict(Failure(error="SaveTimeout", rank=late[0], stage="prepare", reason=reason))}
            if said["failure"] is not None:
                return {"failure": said["failure"]}
            digests[said["rank"]] = said["digest"]
        ranks: dict[str, list[int]] = {}
        for rank in range(self._meeting.world_size):
            ranks.setdefault(digests[rank], []).append(rank)
        return {"failure": None, "ranks": ranks}

    def _text(self, digest: str) -> str:
        coded: str = self._get(f"text/{digest}", _ANSWER_S, as_json=False)
        return zlib.decompress(base64.b85decode(coded)).decode()

    def _get(self, name: str, timeout_s: float, *, as_json: bool = True) -> Any:
        try:
            text = self._meeting.store.get(self._key(name), timeout_s)
        except TimeoutError as error:
            reason = f"rank {self._meeting.rank} waited {timeout_s:.0f} s for what the ranks say of their tensors"
            raise SaveTimeout(reason, step=None, rank=0, stage="prepare", path=self._run_dir) from error
        return json.loads(text) if as_json else text

    def _key(self, name: str) -> str:
        return f"stillframe/{self._meeting.nonce}/exchange-{self._number}/{name}"

    @contextmanager
    def _reaching_rank_0(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            reason = f"rank 0's process, which holds the store, cannot be reached: {error}"
            raise SaveFailed(reason, step=None, rank=0, stage="prepare", path=self._run_dir) from error


def exchange_once(text: str | Exception, *, what: str, path: Path, timeout_s: float) -> Exchanged:
    """`Exchange.exchange` among all ranks of the job, which need not have met: through the store of the default process
    group, where a few kilobytes stay. The ranks' first calls with the same `what` belong together, and their second."""
    meeting = meeting_of_the_job(what, path=path, timeout_s=timeout_s)
    return Exchange(meeting, run_dir=path, timeout_s=timeout_s).exchange(text)
