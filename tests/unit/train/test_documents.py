"""Documents to tokens, with a tokenizer whose tokens are bytes, so that every expectation can be read."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from stillframe.errors import OptionError
from stillframe.train.documents import Corpus, read_corpus
from tests.unit.train.material import MARKED_TEMPLATE, PLAIN_TEMPLATE, make_tokenizer, write_lines

CHAT = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "four"}]
EOS_ID = 256


def documents(corpus: Corpus, tokenizer: object) -> list[tuple[str, str]]:
    """Each document's text, and the text of what is trained on, with "$" for EOS."""
    pairs = []
    for start, end in zip(corpus.starts[:-1], corpus.starts[1:], strict=True):
        tokens, trained = corpus.tokens[start:end], corpus.trained[start:end]
        texts = [tokenizer.decode(ids).replace("<|endoftext|>", "$") for ids in (tokens, tokens[trained])]
        pairs.append((texts[0], texts[1]))
    return pairs


def test_texts_and_chats_in_order_each_ended_once(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    first = write_lines(tmp_path / "a", [{"text": "one"}, {"text": "two<|endoftext|>"}, {"messages": CHAT}])
    second = write_lines(tmp_path / "b", [{"text": ""}, {"text": "three", "source": "ignored"}])
    first.write_text(first.read_text() + "\n   \n")
    corpus = read_corpus([str(first), str(second)], tokenizer)
    whole = ["one$", "two$", "[user]2+2[assistant]four$", "$", "three$"]
    assert documents(corpus, tokenizer) == [(text, text) for text in whole]
    assert corpus.tokens.dtype == np.int32


def test_only_what_the_template_marks_is_trained_on(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(MARKED_TEMPLATE)
    path = write_lines(tmp_path / "a", [{"messages": CHAT}, {"text": "plain"}, {"messages": CHAT + CHAT}])
    assert documents(read_corpus([str(path)], tokenizer), tokenizer) == [
        ("[user]2+2[assistant]four$", "four"),
        ("plain$", "plain$"),
        ("[user]2+2[assistant]four[user]2+2[assistant]four$", "fourfour"),
    ]


def test_tools_reach_the_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{{ tools[0].name }}" + PLAIN_TEMPLATE)
    path = write_lines(tmp_path / "a", [{"messages": CHAT, "tools": [{"name": "add"}]}])
    assert documents(read_corpus([str(path)], tokenizer), tokenizer)[0][0] == "add[user]2+2[assistant]four$"


def test_many_texts_go_through_the_tokenizer_in_order(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = write_lines(tmp_path / "a", [{"text": f"<{number}>"} for number in range(2500)])
    texts = [text for text, _ in documents(read_corpus([str(path)], tokenizer), tokenizer)]
    assert texts == [f"<{number}>$" for number in range(2500)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "{path} line 2 is not JSON"),
        ('{"txt": "a"}', "{path} line 1 is no document"),
        ('{"text": 3}', "{path} line 1 is no document"),
        ('["a"]', "{path} line 1 is no document"),
        ('{"messages": []}', "{path} line 1 is no document"),
        ('{"messages": ["hello"]}', "{path} line 1 is no document"),
        (
            '\n{"messages": [{"role": "user", "content": "?"}]}',
            "{path} line 2 has messages, but the tokenizer has no chat",
        ),
        ("", "no document in {path}"),
        ("\n\n", "no document in {path}"),
    ],
)
def test_bad_line_is_refused_by_file_and_number(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(OptionError, match=re.escape(message.format(path=path))):
        read_corpus([str(path)], make_tokenizer())


def test_refusal_of_the_template_is_passed_on(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a", [{"messages": CHAT}])
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(OptionError, match=r"line 1: the chat template refuses these messages: roles must alternate"):
        read_corpus([str(path)], tokenizer)


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot read .*absent.jsonl: No such file"):
        read_corpus([str(tmp_path / "absent.jsonl")], make_tokenizer())
    (tmp_path / "bytes").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(OptionError, match=r"bytes is not UTF-8"):
        read_corpus([str(tmp_path / "bytes")], make_tokenizer())


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a", [{"messages": CHAT[:1]}])
    with pytest.raises(OptionError, match=r"no token in .* is trained on"):
        read_corpus([str(path)], make_tokenizer(MARKED_TEMPLATE))


def test_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(OptionError, match="no EOS token"):
        read_corpus([str(write_lines(tmp_path / "a", [{"text": "a"}]))], tokenizer)
