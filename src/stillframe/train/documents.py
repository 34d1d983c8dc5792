"""JSON Lines files to tokens: each line one document, each document its tokens and which of them are trained on.

A line is `{"text": ...}`, or `{"messages": [...]}` (with an optional `"tools"`), which the tokenizer's chat template
renders. Every document ends in the EOS token, added where the text or the template did not end in it.

Trained on is every token of a text. Of a chat it is what the template marks with `{% generation %}`, usually the
assistant's words; a template without that mark has the whole chat trained on.

All documents are held in memory, 5 bytes a token, on every rank.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from stillframe.errors import OptionError

TOKENIZER_BATCH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents end to end: document d is `tokens[starts[d] : starts[d + 1]]`, and no document is empty."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    starts: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    where: str
    record: dict[str, Any]


def read_corpus(files: Sequence[str], tokenizer: Any) -> Corpus:
    """Read and tokenize all documents of `files`, in order.

    Raises `OptionError`, naming file and line: a file that cannot be read, a line that is no document, messages
    without a chat template or refused by it; also if there is no document at all, or the tokenizer has no EOS token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise OptionError("the tokenizer has no EOS token, which must end every document; set its eos_token")
    tokens: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    for ids, mask in _tokenized(_lines(files), tokenizer):
        if not ids or ids[-1] != eos:
            # The separator after a chat is trained on only where the whole chat is: else the template's own end counts.
            ids, mask = [*ids, eos], [*mask, all(mask)]
        tokens.append(np.array(ids, dtype=np.int32))
        trained.append(np.array(mask, dtype=np.bool_))
    if not tokens:
        raise OptionError(f"data.files: no document in {', '.join(files)}")
    if not any(mask.any() for mask in trained):
        raise OptionError(
            f"data.files: no token in {', '.join(files)} is trained on (chats without an assistant's turn?)"
        )
    starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    return Corpus(tokens=np.concatenate(tokens), trained=np.concatenate(trained), starts=starts)


def _lines(files: Sequence[str]) -> Iterator[_Line]:
    for name in files:
        try:
            with Path(name).open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _parse_line(line, f"{name} line {number}")
        except OSError as error:
            raise OptionError(f"data.files: cannot read {name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise OptionError(f"data.files: {name} is not UTF-8 text: {error}") from error


def _parse_line(line: str, where: str) -> _Line:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise OptionError(f"data.files: {where} is not JSON: {error}") from error
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return _Line(where=where, record=record)
        messages = record.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            return _Line(where=where, record=record)
    raise OptionError(
        f'data.files: {where} is no document: expected {{"text": "..."}} or '
        '{"messages": [{"role": "...", "content": "..."}, ...]}'
    )


def _tokenized(lines: Iterator[_Line], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids and what is trained on, one pair per line. Runs of texts go through the tokenizer together."""
    for is_text, group in itertools.groupby(lines, key=lambda line: "text" in line.record):
        if not is_text:
            for line in group:
                yield _tokenized_chat(line, tokenizer)
            continue
        while batch := [line.record["text"] for line in itertools.islice(group, TOKENIZER_BATCH)]:
            for ids in tokenizer(batch, verbose=False)["input_ids"]:
                yield ids, [True] * len(ids)


def _tokenized_chat(line: _Line, tokenizer: Any) -> tuple[list[int], list[bool]]:
    if not tokenizer.chat_template:
        raise OptionError(f"data.files: {line.where} has messages, but the tokenizer has no chat template")
    tools = line.record.get("tools")
    try:
        marks_generation = (
            re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template(tools=tools)) is not None
        )
        encoded = tokenizer.apply_chat_template(
            line.record["messages"],
            tools=tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=marks_generation,
            tokenizer_kwargs={"verbose": False},
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise OptionError(f"data.files: {line.where}: the chat template refuses these messages: {error}") from error
    ids = list(encoded["input_ids"])
    return ids, [bool(mark) for mark in encoded["assistant_masks"]] if marks_generation else [True] * len(ids)
