"""What the demo trains on, made from what every Python carries: the help topics of `pydoc`, 465 kB of English.

A byte-level BPE tokenizer trained on all of them, the short ones as documents and as chats, and the configuration of a
small but real Qwen3-MoE, with all parts of its large sisters: fused experts, a router, grouped-query attention. It is
wide rather than deep, which learns most in the few steps that there is time for.
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

VOCAB_SIZE = 2048
LONGEST_TOPIC = 1500
"""Characters; the shorter topics are about 8,000 tokens, few enough to be read many times in the demo's steps."""
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONFIG = """\
run_dir = "{run_dir}"
seed = 7
hooks = ["reference:SaveReference"]

[model]
tokenizer = "{tokenizer_dir}"

[model.config]
model_type = "qwen3_moe"
vocab_size = {vocab_size}
hidden_size = 384
num_hidden_layers = 2
num_attention_heads = 8
num_key_value_heads = 4
head_dim = 48
intermediate_size = 768
moe_intermediate_size = 384
num_experts = 24
num_experts_per_tok = 2
norm_topk_prob = true
max_position_embeddings = 1024
attention_dropout = 0.05
tie_word_embeddings = false
output_router_logits = true
router_aux_loss_coef = 0.01
bos_token_id = 0
eos_token_id = 0
pad_token_id = 0

[data]
files = ["{topics_path}", "{chats_path}"]
seq_len = 128

[training]
total_steps = {total_steps}
micro_batch_size = 6
device = "cpu"

[optimizer]
lr = 4e-3
warmup_steps = 5
min_lr_ratio = 0.3

[export]
hf_interval = {save_interval}
hf_max_keep = 2
max_shard_size = "40MB"

[checkpoint]
checkpoint_interval = {save_interval}
checkpoint_maxkeep = 1
"""


def make_inputs(demo_dir: Path, *, total_steps: int, save_interval: int) -> Path:
    """Write tokenizer, data and configuration into `demo_dir`; returns the path of the configuration."""
    tokenizer_dir = demo_dir / "tokenizer"
    make_tokenizer().save_pretrained(tokenizer_dir)

    names = sorted(name for name, text in topics.items() if len(text) <= LONGEST_TOPIC)
    topics_path = demo_dir / "topics.jsonl"
    topics_path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in names))
    chats_path = demo_dir / "chats.jsonl"
    chats_path.write_text("".join(json.dumps({"messages": _chat(name)}) + "\n" for name in names))

    config_path = demo_dir / "demo.toml"
    config_path.write_text(
        CONFIG.format(
            run_dir=demo_dir / "run",
            tokenizer_dir=tokenizer_dir,
            vocab_size=VOCAB_SIZE,
            topics_path=topics_path,
            chats_path=chats_path,
            total_steps=total_steps,
            save_interval=save_interval,
        )
    )
    return config_path


def make_tokenizer() -> Qwen2Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    wrapped = Qwen2Tokenizer(tokenizer_object=tokenizer)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _chat(name: str) -> list[dict[str, str]]:
    """One topic as a question and its first paragraphs as the answer."""
    return [
        {"role": "user", "content": f"What does Python's help say about {name!r}?"},
        {"role": "assistant", "content": topics[name].strip()[:600].rpartition("\n")[0]},
    ]
