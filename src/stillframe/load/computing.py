"""Tensors of a model that a conversion computes: made, where they are needed, of whole stored tensors.

Nearly all of a model is parts of stored tensors, read straight into place. Of a few models some tensors have their rows
in another order than the files, as in rotary embeddings, or new values. For these Transformers' own operations run on
the host, on all keys that are converted together. The counterpart of `layout.computing`.
"""

from __future__ import annotations

import torch

from stillframe.errors import LoadError
from stillframe.layout.runs import Runs
from stillframe.load.folder import listed
from stillframe.load.keys import LoadKeys
from stillframe.load.reading import Reader
from stillframe.load.sources import Computed, Conversion


class Filler:
    """Fills tensors from the runs in `keys`, of stored tensors, which `reader` reads, and of computed ones.

    Of the latter, what a conversion made stays in memory until another conversion's turn. So each runs once where
    tensors are asked for in the order of `position`.
    """

    def __init__(self, reader: Reader, keys: LoadKeys) -> None:
        self._reader = reader
        self._sources = keys.sources
        self._computed = keys.computed
        self._converted: Conversion | None = None
        self._made: dict[str, torch.Tensor] = {}

    @property
    def bytes_read(self) -> int:
        """How many bytes of data were read so far."""
        return self._reader.bytes_read

    def conversion(self, runs: Runs) -> Conversion | None:
        """The conversion that makes what `runs`, of one tensor, point into; None where that is stored."""
        number = int(runs.source[0]) - len(self._sources) if len(runs) else -1
        return self._computed[number].conversion if number >= 0 else None

    def position(self, runs: Runs) -> tuple[int, int]:
        """Where the reading begins that `runs` need, to read in the files' order."""
        return self._reader.position(self._over_stored(runs))

    def stored_names(self, runs: Runs) -> set[str]:
        """The stored tensors that are read for `runs`."""
        return self._reader.stored_names(self._over_stored(runs))

    @torch.no_grad()
    def fill(self, flat: torch.Tensor, runs: Runs) -> None:
        """Like `Reader.fill`; raises LoadError, too, where a conversion fails, or makes what it did not of shapes."""
        if self.conversion(runs) is None:
            self._reader.fill(flat, runs)
            return
        values = self._values(self._computed[int(runs.source[0]) - len(self._sources)])
        rows = zip(runs.start.tolist(), runs.source_start.tolist(), runs.length.tolist(), strict=True)
        for into, origin, length in rows:
            flat[into : into + length].copy_(values[origin : origin + length])

    def _over_stored(self, runs: Runs) -> Runs:
        """Runs over all stored tensors that are read for `runs`."""
        conversion = self.conversion(runs)
        return runs if conversion is None else Runs.of([(0, source, 0, 1) for source in conversion.sources])

    def _values(self, wanted: Computed) -> torch.Tensor:
        if self._converted is not wanted.conversion:
            self._converted, self._made = None, {}  # dropped before there is more
            self._made = self._convert(wanted.name, wanted.conversion)
            self._converted = wanted.conversion
        return self._made[wanted.name]

    def _convert(self, wanted: str, conversion: Conversion) -> dict[str, torch.Tensor]:
        whole = []
        for source, shape in zip(conversion.sources, conversion.shapes, strict=True):
            tensor = torch.empty(shape, dtype=conversion.dtype, device="cpu")
            if tensor.numel():
                self._reader.fill(tensor.view(-1), Runs.of([(0, source, 0, tensor.numel())]))
            whole.append(tensor)
        what = listed([self._sources[source].key for source in conversion.sources])
        try:
            results = conversion.run(whole)
        except Exception as error:
            raise LoadError(f"{wanted} cannot be computed of {what}: {error}") from error
        made = {}
        for computed in (one for one in self._computed if one.conversion is conversion):
            found = results.get(computed.name)
            if found is None or tuple(found.shape) != computed.shape:
                made_of_values = "nothing" if found is None else f"{tuple(found.shape)}"
                raise LoadError(
                    f"{computed.name}: its conversion makes {made_of_values} of {what}, and {computed.shape} of their "
                    "shapes alone"
                )
            made[computed.name] = found.contiguous().view(-1)
        return made
