"""Export of a model of more than 1 GiB from 2 ranks: stall, written, published, memory, against the limits.

    .venv/bin/python benchmarks/export.py [--rounds 7] [--directory DIR]

Every round measures, one after the other on both ranks at once: a memcpy of the rank's own bytes, a bare durable
write of the same number of bytes, and a save; ratios are formed within a round. The first save is reported apart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch.distributed as dist

BENCHMARKS_DIR = Path(__file__).parent
sys.path.insert(0, str(BENCHMARKS_DIR.parent))

from benchmarks.limits import BareWrite, WarmCopy  # noqa: E402
from benchmarks.machine import describe, end_cleanly_when_told_to, pss_bytes, spread  # noqa: E402
from stillframe.testing import run_ranks  # noqa: E402

WORLD_SIZE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One rank's seconds in one round."""

    memcpy_s: float
    bare_write_s: float
    stall_s: float
    written_s: float
    published_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFigures:
    staged_bytes: int
    first: Round
    rounds: tuple[Round, ...]
    extra_bytes: tuple[int, ...]


def measure(directory: Path, rounds: int) -> RankFigures:
    import os

    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import stillframe

    rank = dist.get_rank()
    config = Qwen3Config(
        vocab_size=65536,
        hidden_size=1536,
        intermediate_size=4608,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=96,
        dtype=torch.bfloat16,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    copy = WarmCopy([parameter.to_local() for parameter in model.parameters()])
    bare = BareWrite(directory / f"bare-{rank}", copy.total_bytes)
    copy.seconds()
    bare.seconds()
    before = pss_bytes(os.getpid())
    extra = []
    with stillframe.Checkpointer(directory / "run", model=model, max_shard_size="500MB", hf_max_keep=1) as ckpt:

        def one_round(step: int) -> Round:
            dist.barrier()
            memcpy_s = copy.seconds()
            dist.barrier()
            bare_write_s = bare.seconds()
            dist.barrier()
            ckpt.save_hf(step)
            report = ckpt.reports[-1]
            dist.barrier()
            extra.append(pss_bytes(os.getpid()) + pss_bytes(ckpt.writer_pid) - before)
            return Round(
                memcpy_s=memcpy_s,
                bare_write_s=bare_write_s,
                stall_s=report.stall_s,
                written_s=report.written_s,
                published_s=report.published_s,
            )

        first, *others = (one_round(step) for step in range(1 + rounds))
        staged_bytes = ckpt.reports[-1].staged_bytes
    return RankFigures(staged_bytes=staged_bytes, first=first, rounds=tuple(others), extra_bytes=tuple(extra))


def report(figures: list[RankFigures], directory: Path) -> str:
    """The table. A round's time is that of its slowest rank; a ratio is formed within its round."""
    rounds = list(zip(*(rank.rounds for rank in figures), strict=True))
    total = sum(rank.staged_bytes for rank in figures)

    def slowest(field: str) -> list[float]:
        return [max(getattr(r, field) for r in ranks) for ranks in rounds]

    def first(field: str) -> str:
        return f"{max(getattr(rank.first, field) for rank in figures):.3f}"

    memcpy, bare, stall, written, published = (
        slowest(f) for f in ("memcpy_s", "bare_write_s", "stall_s", "written_s", "published_s")
    )
    extra = [rank.extra_bytes[-1] / rank.staged_bytes for rank in figures]
    growth = [(rank.extra_bytes[-1] - rank.extra_bytes[1]) / rank.staged_bytes for rank in figures]
    rows = [
        ("memcpy of the rank's bytes, s", spread(memcpy), first("memcpy_s")),
        ("bare write + fsync of the same bytes, s", spread(bare), first("bare_write_s")),
        ("stall, s", spread(stall), first("stall_s")),
        ("written, s", spread(written), first("written_s")),
        ("published, s", spread(published), first("published_s")),
        ("stall / memcpy", spread([s / m for s, m in zip(stall, memcpy, strict=True)], 2), ""),
        ("published / bare write", spread([p / b for p, b in zip(published, bare, strict=True)], 2), ""),
        ("extra memory / staged bytes (trainer + writer, PSS)", f"{max(extra):.3f}", ""),
        ("growth from the second save to the last / staged bytes", f"{max(growth):.4f}", ""),
    ]
    lines = [
        describe(directory),
        f"{total / 2**30:.2f} GiB of bfloat16 weights on {len(figures)} ranks, "
        f"{len(rounds)} interleaved rounds after the first; median (minimum to maximum)",
        "",
        "| figure | all later saves | first save |",
        "|---|---|---|",
        *(f"| {name} | {value} | {first_value} |" for name, value, first_value in rows),
        "",
        f"durable write in the median round: {total / median(published) / 1e9:.2f} GB/s "
        f"(bare: {total / median(bare) / 1e9:.2f} GB/s)",
    ]
    return "\n".join(lines)


def main() -> None:
    end_cleanly_when_told_to()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=None, help="where to write; a temporary directory if absent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillframe-bench-", dir=arguments.directory) as directory:
        figures = run_ranks(WORLD_SIZE, measure, Path(directory), arguments.rounds, timeout_s=900)
        print(report(figures, Path(directory)))


if __name__ == "__main__":
    main()
