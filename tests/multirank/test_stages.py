"""Ranks whose models are stages of a pipeline: exports as of the whole model, checkpoints onto other stages or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import stillframe
from stillframe.testing import run_ranks
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe
from tests.multirank.exports import digests
from tests.multirank.stages import cut

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": tiny_qwen3,
    "untied": lambda: tiny_qwen3(tied=False),
    "moe": tiny_qwen3_moe,
}
# Model, its stages, and the ranks that it is exported from.
EXPORTS = [
    ("tied", "pp2", 2),
    ("untied", "pp2", 4),
    ("moe", "pp2 fsdp", 4),
    ("tied", "pp2 fsdp", 4),
    ("untied", "pp2 own", 4),
    ("untied", "pp3", 3),
]


def export_stages(run_dir: Path, cases: list[tuple[str, str]]) -> list[int]:
    staged = []
    for name, how in cases:
        model = cut(MODELS[name](), how)
        for size in ("50GB", "50KB"):
            with stillframe.Checkpointer(
                run_dir / f"{name} {how} {size}", model=model, pipeline=True, max_shard_size=size, save_timeout_s=60
            ) as ckpt:
                ckpt.save_hf(1)
                staged.append(ckpt.reports[-1].staged_bytes)
    return staged


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_an_export_of_stages_is_that_of_the_whole_model(tmp_path: Path, ranks: int) -> None:
    cases = [(name, how) for name, how, count in EXPORTS if count == ranks]
    staged = run_ranks(ranks, export_stages, tmp_path, cases)
    for name, how in cases:
        for size in ("50GB", "50KB"):
            reference = tmp_path / f"{name} {size}"
            MODELS[name]().save_pretrained(reference, max_shard_size=size)
            found = digests(tmp_path / f"{name} {how} {size}" / "hf-1")
            del found["stillframe.json"]
            assert found == digests(reference), (name, how, size)
    if ranks == 4:  # what the ranks of one stage hold alike is shared out among them
        for of_rank, of_other in zip(staged[0], staged[1], strict=True):
            assert abs(of_rank - of_other) < 20_000
