"""What the ranks of a pipeline know of each other's tensors: exchanged when all are asked to, kept meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable

from stillframe.commit.exchange import Exchange
from stillframe.errors import LayoutError, StillframeError
from stillframe.layout.stages import Stages


class KnownStages:
    """The `Stages` of what `describe` describes on each rank, as of the last exchange."""

    def __init__(self, exchange: Exchange, describe: Callable[[], str]) -> None:
        self._exchange = exchange
        self._describe = describe
        self._own: str | None = None
        self._told: object = None
        self._stages: Stages | None = None

    def renew(self) -> bool:
        """Exchange what there is now; whether that is something else than before. Every rank calls this.

        Blocks until every rank has. Raises on every rank what one of them raised, or LayoutError where their
        descriptions cannot be those of one model.
        """
        self._stages, before = None, self._told
        own: str | Exception
        try:
            own = self._describe()
        except Exception as error:  # noqa: BLE001  # the other ranks wait for a word of this one
            own = error
        told = self._exchange.exchange(own)
        assert isinstance(own, str), "what kept a rank from describing its tensors is raised"
        self._own, self._told = own, told
        self._stages = Stages(told.texts, told.ranks)
        return told != before

    @property
    def keys_of_others(self) -> frozenset[str]:
        """The keys (`model.<name>`) of what other stages have, aliases included, as of the last exchange."""
        if self._stages is None or self._own is None:
            return frozenset()
        own = json.loads(self._own)
        mine = {*(entry[0] for entry in own["tensors"]), *own["extra"].get("aliases", ())}
        aliases = {alias for extra in self._stages.extras for alias in extra.get("aliases", ())}
        return frozenset({*self._stages, *aliases} - mine)

    def now(self) -> Stages:
        """The stages, if this rank's is as it was told to the others. Raises StillframeError if not, LayoutError where
        the last exchange failed."""
        if self._stages is None:
            raise LayoutError("the ranks do not know which tensors the others hold; call prepare() on every rank")
        if self._describe() != self._own:
            raise StillframeError(
                "this rank's stage has other tensors than when the ranks told each other what they hold: parameters "
                "were frozen or replaced, or the optimizer has new state. Call prepare() on every rank, then save again"
            )
        return self._stages
