"""A fresh process with plain Transformers: load an export as any user of it would, and let it write.

python generate.py CHECKPOINT_DIR
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

sys.modules["stillframe"] = None  # type: ignore[assignment]  # from here on, importing it fails: nothing below needs it

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PROMPTS = ['The "break" statement', 'The "while" statement']
QUESTION = "What does Python's help say about 'if'?"


def main(checkpoint_dir: str) -> None:
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir, local_files_only=True)
    model, loading = AutoModelForCausalLM.from_pretrained(
        checkpoint_dir, local_files_only=True, output_loading_info=True
    )
    wrong = {name: keys for name, keys in loading.items() if keys}
    if wrong:
        sys.exit(f"the export does not fit the model: {wrong}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {parameters / 1e6:.1f} million parameters, every key found, none left over")

    torch.manual_seed(0)
    for prompt in PROMPTS:
        show(prompt, continuation(model, tokenizer, **tokenizer(prompt, return_tensors="pt")))
    question = [{"role": "user", "content": QUESTION}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    show(QUESTION, continuation(model, tokenizer, **chat))


def continuation(model: torch.nn.Module, tokenizer: object, **inputs: torch.Tensor) -> str:
    output = model.generate(**inputs, max_new_tokens=32, do_sample=True, temperature=0.3, top_k=5)
    return " ".join(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split())


def show(prompt: str, text: str) -> None:
    print(f"  {prompt} ... {text}")


if __name__ == "__main__":
    main(sys.argv[1])
    assert sys.modules["stillframe"] is None
