"""Packing, exactly: with a corpus whose every token is another number, each can be followed to where it goes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.errors import OptionError
from stillframe.train.data import IGNORED, Batch, PackedBatches
from stillframe.train.documents import Corpus


def numbered_corpus(lengths: list[int], untrained: set[int] = frozenset()) -> Corpus:  # type: ignore[assignment]
    """Documents of these lengths; token i of the corpus is the number i, and not trained on if in `untrained`."""
    total = sum(lengths)
    return Corpus(
        tokens=np.arange(total, dtype=np.int32),
        trained=np.array([i not in untrained for i in range(total)]),
        starts=np.cumsum([0, *lengths], dtype=np.int64),
    )


def batches(corpus: Corpus, *, rank: int = 0, world_size: int = 1, micro: int = 1, accumulation: int = 1, **rest: int):  # type: ignore[no-untyped-def]
    return PackedBatches(
        corpus,
        seq_len=rest.get("seq_len", 8),
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        rank=rank,
        world_size=world_size,
        seed=rest.get("seed", 0),
    )


def rows(packed: PackedBatches, steps: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Input ids, labels, position ids of each sequence of `steps` steps, in this rank's order."""
    result = []
    for _ in range(steps):
        for batch in packed.batches():
            columns = (batch.input_ids, batch.labels, batch.position_ids)
            result += [tuple(column[row].tolist() for column in columns) for row in range(len(batch.input_ids))]
        packed.advance()
    return result


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    seq_len=st.integers(2, 11),
    epochs=st.integers(1, 3),
    data=st.data(),
)
def test_each_epoch_reads_every_token_once_and_labels_follow(
    lengths: list[int], seq_len: int, epochs: int, data: st.DataObject
) -> None:
    total = sum(lengths)
    untrained = data.draw(st.sets(st.integers(0, total - 1)))
    corpus = numbered_corpus(lengths, untrained)
    packed = batches(corpus, seq_len=seq_len)
    sequences = rows(packed, packed.steps_for(epochs))
    stream = [token for inputs, _, _ in sequences for token in inputs]
    for epoch in range(epochs):
        assert sorted(stream[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert len(stream) - epochs * total < seq_len  # nothing beyond the last sequence

    firsts = set(corpus.starts[:-1].tolist())
    for inputs, labels, positions in sequences:
        for i, (token, label, position) in enumerate(zip(inputs, labels, positions, strict=True)):
            follower = token + 1
            has_label = follower < total and follower not in firsts and follower not in untrained
            assert label == (follower if has_label else IGNORED)
            document_start = int(corpus.starts[np.searchsorted(corpus.starts, token, side="right") - 1])
            assert position == min(i, token - document_start)


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"), [(1, 4, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (1, 1, 4)]
)
def test_the_global_batch_is_the_same_however_it_is_split(world_size: int, micro: int, accumulation: int) -> None:
    corpus = numbered_corpus([5, 13, 1, 30, 8, 2])
    whole = rows(batches(corpus, micro=4), 5)
    split = [
        rows(batches(corpus, rank=rank, world_size=world_size, micro=micro, accumulation=accumulation), 5)
        for rank in range(world_size)
    ]
    for step in range(5):
        per_rank = 4 // world_size
        dealt = [row for rank_rows in split for row in rank_rows[step * per_rank : (step + 1) * per_rank]]
        expected = whole[step * 4 : (step + 1) * 4]
        assert sorted(dealt) == sorted(expected)  # so the ranks' parts are disjoint, and nothing is missing


def test_order_depends_on_seed_and_epoch_alone() -> None:
    corpus = numbered_corpus([3] * 16)
    first, again, other = (rows(batches(corpus, seed=seed), 12) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    epoch_rows = len(corpus.tokens) // 8
    assert first[:epoch_rows] != first[epoch_rows:]


def test_a_batch_is_a_function_of_its_position() -> None:
    corpus = numbered_corpus([7, 4, 9])
    expected = rows(batches(corpus), 20)
    packed = batches(corpus)
    for position in (19, 2, 10, 0):
        packed.load_state_dict(packed.state_dict() | {"consumed_sequences": position})
        for _ in range(2):  # not advanced in between
            assert packed.batches()[0].input_ids.tolist() == [expected[position][0]]


@settings(deadline=None, max_examples=100)
@given(
    legs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3)), max_size=5),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
)
def test_no_sequence_is_lost_or_repeated_over_changes_of_ranks_and_batch(
    legs: list[tuple[int, int, int, int]], lengths: list[int]
) -> None:
    corpus = numbered_corpus(lengths)
    state = batches(corpus).state_dict()
    read: list[Any] = []
    for world_size, micro, accumulation, steps in legs:
        parts = [
            batches(corpus, rank=rank, world_size=world_size, micro=micro, accumulation=accumulation)
            for rank in range(world_size)
        ]
        for part in parts:
            part.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            read += sorted((row for part in parts for row in rows(part, 1)), key=str)
        (state,) = {json.dumps(part.state_dict()): part.state_dict() for part in parts}.values()
    position = state["consumed_sequences"]
    assert position == sum(world * micro * accumulation * steps for world, micro, accumulation, steps in legs)
    assert sorted(read, key=str) == sorted(rows(batches(corpus), position), key=str)


@pytest.mark.parametrize(
    ("corpus", "rest", "message"),
    [
        (numbered_corpus([5, 6, 30]), {"seed": 1}, r"other data: seed was 0, is 1\. Give"),
        (numbered_corpus([5, 6, 30]), {"seq_len": 9}, r"other data: seq_len was 8, is 9\. Give"),
        (numbered_corpus([5, 6, 30, 1]), {}, "corpus_documents was 3, is 4; corpus_tokens was 41, is 42; corpus_dig"),
        (numbered_corpus([6, 5, 30]), {}, r"other data: corpus_digest was '\w{32}', is '\w{32}'\. Give"),
        (numbered_corpus([5, 6, 30], untrained={7}), {}, "other data: corpus_digest was"),
    ],
)
def test_a_position_in_other_data_is_refused(corpus: Corpus, rest: dict[str, int], message: str) -> None:
    state = batches(numbered_corpus([5, 6, 30])).state_dict()
    other = batches(corpus, **rest)
    other.advance()
    with pytest.raises(OptionError, match=message):
        other.load_state_dict(state)
    assert other.consumed_sequences == 1


@pytest.mark.parametrize("position", [None, -1, 1.0, True, "1"])
def test_what_is_no_position_is_refused(position: object) -> None:
    packed = batches(numbered_corpus([5, 6, 30]))
    with pytest.raises(OptionError, match="no number of sequences"):
        packed.load_state_dict(packed.state_dict() | {"consumed_sequences": position})


def test_types_and_counts() -> None:
    (batch,) = batches(numbered_corpus([5, 6, 30], untrained={20, 21}), micro=3).batches()
    assert isinstance(batch, Batch)
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.int64, (3, 8))
    assert batch.label_tokens == Counter((batch.labels != IGNORED).flatten().tolist())[True]


def test_epochs_and_steps() -> None:
    packed = batches(numbered_corpus([10, 10, 10]), world_size=2, micro=1, seq_len=5)  # 30 tokens, 10 a step
    assert (packed.tokens_per_epoch, packed.tokens_per_step) == (30, 10)
    assert [packed.epoch_ahead(steps) for steps in (0, 2, 3, 5, 6)] == [1, 1, 2, 2, 3]
    assert [packed.steps_for(epochs) for epochs in (1, 2)] == [3, 6]
    packed.advance()
    assert [packed.epoch_ahead(steps) for steps in (0, 1, 2, 4, 5)] == [1, 1, 2, 2, 3]
    assert [packed.steps_for(epochs) for epochs in (1, 2)] == [2, 5]
    ragged = batches(numbered_corpus([10, 11]), seq_len=5)
    assert ragged.steps_for(1) == 5
    assert ragged.epoch_ahead(4) == 1
    for _ in range(6):
        ragged.advance()
    assert ragged.steps_for(1) == 0
