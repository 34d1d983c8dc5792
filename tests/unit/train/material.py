"""Small real inputs for the trainer: a tokenizer, documents, configurations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2Tokenizer

from stillframe.train.config import TrainConfig, parse_config

EOS = "<|endoftext|>"
PLAIN_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
MARKED_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)


def make_tokenizer(chat_template: str | None = None) -> Any:
    """One token per byte, 256 of them, and an EOS token with id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    wrapped = Qwen2Tokenizer(tokenizer_object=tokenizer)
    wrapped.chat_template = chat_template
    return wrapped


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


def table(work_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration, as TOML gives it, with its inputs in `work_dir`; `sections` change single keys."""
    tokenizer_dir = work_dir / "tokenizer"
    if not tokenizer_dir.exists():
        make_tokenizer(MARKED_TEMPLATE).save_pretrained(tokenizer_dir)
        texts = [{"text": f"Document {i} counts: " + " ".join(map(str, range(i)))} for i in range(30)]
        chats = [
            [
                {"role": "user", "content": f"Double {i}, please."},
                {"role": "assistant", "content": f"{2 * i}" * (1 + i % 9)},
            ]
            for i in range(30)
        ]
        write_lines(work_dir / "data.jsonl", [*texts, *({"messages": chat} for chat in chats)])
    whole: dict[str, Any] = {
        "run_dir": str(work_dir / "run"),
        "model": {"config": dict(QWEN3), "tokenizer": str(tokenizer_dir)},
        "data": {"files": [str(work_dir / "data.jsonl")], "seq_len": 32},
        "training": {"total_steps": 4, "device": "cpu"},
        "optimizer": {"lr": 3e-3},
        "export": {},
        "checkpoint": {},
        "writer": {},
        "resume": {},
    }
    for name, values in sections.items():
        whole[name] |= values
    return whole


def config(work_dir: Path, **sections: dict[str, Any]) -> TrainConfig:
    return parse_config(table(work_dir, **sections), source="test")
