"""Documents to batches: packed end to end, cut every `seq_len` tokens, each batch a pure function of its step.

The data is one endless stream: the documents in the order of epoch 1, then in the order of epoch 2, and so on, each
epoch's order a permutation drawn from the seed and the epoch's number. Sequence s of the run is the stream's tokens
[s * seq_len, (s + 1) * seq_len). Step t of N ranks takes the next `N * micro_batch_size * gradient_accumulation_steps`
sequences, dealt out to the ranks in turn. So in every epoch each token is read exactly once, none is dropped or padded,
the same global batch holds the same sequences at any number of ranks, and the position in the data is the step's
number: there is no other state.

The label of a token is the token after it, where that belongs to the same document and is trained on. `position_ids`
restart at each document; Transformers derives from them that no token attends to another document.
Source: `find_packed_sequence_indices` in transformers/masking_utils.py (sdpa, eager, flex) and
`prepare_fa_kwargs_from_position_ids` in modeling_flash_attention_utils.py; both need `use_cache=False`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillframe.train.documents import Corpus

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
    """The batches of one rank; see the module's docstring for which tokens they hold."""

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
        self._corpus = corpus
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._orders: dict[int, _Order] = {}

    def steps_for(self, epochs: int) -> int:
        """Steps that read every token at least `epochs` times; the last batch is filled from the epoch after."""
        return -(-epochs * self.tokens_per_epoch // self.tokens_per_step)

    def epoch_at(self, step: int) -> int:
        """The epoch, from 1, in which the first token of `step` (from 1) lies."""
        return (step - 1) * self.tokens_per_step // self.tokens_per_epoch + 1

    def batch(self, step: int, micro_step: int) -> Batch:
        """This rank's micro-batch `micro_step` (from 0) of `step` (from 1)."""
        first = (step - 1) * self.sequences_per_step
        first += (micro_step * self._world_size + self._rank) * self.micro_batch_size
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
