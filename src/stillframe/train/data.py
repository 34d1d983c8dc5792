"""Documents to batches: packed end to end, cut every `seq_len` tokens, each batch a pure function of its position.

The data is one endless stream: the documents in the order of epoch 1, then in the order of epoch 2, and so on, each
epoch's order a permutation drawn from the seed and the epoch's number. Sequence s of the run is the stream's tokens
[s * seq_len, (s + 1) * seq_len). A step of N ranks takes the next `N * micro_batch_size * gradient_accumulation_steps`
sequences, dealt out to the ranks in turn. So in every epoch each token is read exactly once, none is dropped or padded,
the same global batch holds the same sequences at any number of ranks, and the position in the data is the number of
sequences that were taken: there is no other state, and it means the same at any number of ranks and any batch size.

The label of a token is the token after it, where that belongs to the same document and is trained on. `position_ids`
restart at each document; Transformers derives from them that no token attends to another document.
Source: `find_packed_sequence_indices` in transformers/masking_utils.py (sdpa, eager, flex) and
`prepare_fa_kwargs_from_position_ids` in modeling_flash_attention_utils.py; both need `use_cache=False`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillframe.errors import OptionError
from stillframe.train.documents import Corpus

State = dict[str, int | str]

IGNORED = -100
"""The label of a token that is not trained on; what `torch.nn.functional.cross_entropy` ignores by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rank's micro-batch: int64 tensors [micro_batch_size, seq_len] in host memory.

    `labels[b, i]` is the token that follows `input_ids[b, i]` (already shifted), or `IGNORED`; `label_tokens` counts
    those that are not ignored.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    label_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """The documents of one epoch: document `documents[i]` ends at `ends[i]` tokens from the epoch's start."""

    documents: NDArray[np.int64]
    ends: NDArray[np.int64]


class PackedBatches:
    """The batches of one rank; see the module's docstring for which tokens they hold.

    `consumed_sequences` is the position: how many sequences of the stream all ranks together have taken.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.sequences_per_step = world_size * micro_batch_size * gradient_accumulation_steps
        self.tokens_per_step = self.sequences_per_step * seq_len
        self.tokens_per_epoch = len(corpus.tokens)
        self.consumed_sequences = 0
        self._corpus = corpus
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._orders: dict[int, _Order] = {}

    def steps_for(self, epochs: int) -> int:
        """Steps from here until every token was read at least `epochs` times since the start of the stream; the last
        batch is filled from the epoch after."""
        left = epochs * self.tokens_per_epoch - self.consumed_sequences * self.seq_len
        return max(0, -(-left // self.tokens_per_step))

    def epoch_ahead(self, steps: int = 0) -> int:
        """The epoch, from 1, of the first token of the next step; or of the one that many `steps` after it."""
        first = self.consumed_sequences + steps * self.sequences_per_step
        return first * self.seq_len // self.tokens_per_epoch + 1

    def batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step; the same ones again until `advance`."""
        return [self._batch(micro_step) for micro_step in range(self.gradient_accumulation_steps)]

    def advance(self) -> None:
        """The next step is taken: go on to the one after."""
        self.consumed_sequences += self.sequences_per_step

    def state_dict(self) -> State:
        """The position and what it is a position in; the same on all ranks, and JSON."""
        return {
            "consumed_sequences": self.consumed_sequences,
            "consumed_tokens": self.consumed_sequences * self.seq_len,
            "epoch": self.epoch_ahead(),
            **self._stream,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from there: at any number of ranks and any batch size, no sequence is lost or read twice.

        Raises `OptionError`, with each difference, if it is a position in another stream: another seed, `seq_len` or
        corpus; and if it is none.
        """
        consumed = state.get("consumed_sequences")
        if not isinstance(consumed, int) or isinstance(consumed, bool) or consumed < 0:
            raise OptionError(f"the position in the data is no number of sequences: {consumed!r}")
        differences = [
            f"{name} was {state.get(name)!r}, is {value!r}"
            for name, value in self._stream.items()
            if state.get(name) != value
        ]
        if differences:
            raise OptionError(
                f"the checkpoint's position is one in other data: {'; '.join(differences)}. Give the run the data, "
                "data.seq_len and seed that it had; or begin this data at its start, in a new run_dir that names the "
                "checkpoint as resume.from, with resume.load_dataset = false"
            )
        self.consumed_sequences = consumed

    @functools.cached_property
    def _stream(self) -> State:
        """What determines the stream, and so what a number of sequences means. Reads the corpus once, 1 GB/s or so."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self._corpus.tokens, self._corpus.trained, self._corpus.starts):
            digest.update(np.ascontiguousarray(part).data)
        return {
            "seed": self._seed,
            "seq_len": self.seq_len,
            "corpus_documents": len(self._corpus.starts) - 1,
            "corpus_tokens": self.tokens_per_epoch,
            "corpus_digest": digest.hexdigest(),
        }

    def _batch(self, micro_step: int) -> Batch:
        first = self.consumed_sequences + (micro_step * self._world_size + self._rank) * self.micro_batch_size
        rows = [self._sequence(first + row) for row in range(self.micro_batch_size)]
        input_ids, labels, position_ids = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        label_tokens = int((labels != IGNORED).sum())
        return Batch(input_ids=input_ids, labels=labels, position_ids=position_ids, label_tokens=label_tokens)

    def _sequence(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Input ids, labels and position ids of one sequence, from its tokens and the one after."""
        tokens, trained, is_first = self._read(index * self.seq_len, self.seq_len + 1)
        labels = np.where(trained[1:] & ~is_first[1:], tokens[1:], IGNORED)
        indices = np.arange(self.seq_len)
        document_starts = np.maximum.accumulate(np.where(is_first[:-1], indices, 0))
        return tokens[:-1], labels, indices - document_starts

    def _read(self, offset: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """`length` tokens of the stream from `offset`: the ids, which are trained on, which begin a document."""
        tokens = np.empty(length, dtype=np.int64)
        trained = np.empty(length, dtype=np.bool_)
        is_first = np.zeros(length, dtype=np.bool_)
        done = 0
        while done < length:
            epoch, epoch_offset = divmod(offset + done, self.tokens_per_epoch)
            order = self._order(epoch + 1)
            place = int(np.searchsorted(order.ends, epoch_offset, side="right"))
            document = int(order.documents[place])
            start, end = self._corpus.starts[document : document + 2]
            begin = int(end - (order.ends[place] - epoch_offset))
            count = min(int(end) - begin, length - done)
            tokens[done : done + count] = self._corpus.tokens[begin : begin + count]
            trained[done : done + count] = self._corpus.trained[begin : begin + count]
            is_first[done] = begin == start
            done += count
        return tokens, trained, is_first

    def _order(self, epoch: int) -> _Order:
        """The documents of `epoch` (from 1); the last two epochs asked for are kept, for sequences on their border."""
        if epoch not in self._orders:
            lengths = np.diff(self._corpus.starts)
            documents = np.random.default_rng((self._seed, epoch)).permutation(len(lengths))
            while len(self._orders) >= 2:
                del self._orders[min(self._orders)]
            self._orders[epoch] = _Order(documents=documents, ends=np.cumsum(lengths[documents]))
        return self._orders[epoch]
