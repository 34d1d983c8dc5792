"""Exports of matrices cut along their columns on 2 ranks: as many short runs, or exchanged to whole rows.

    .venv/bin/python benchmarks/reshuffle.py [--rounds 5] [--run-kib 4 16] [--directory DIR]

For each length of the runs, rounds of both ways take turns, on a model of about 0.5 GiB; the first save of each is not
counted. A time is that of the slower rank.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

BENCHMARKS_DIR = Path(__file__).parent
sys.path.insert(0, str(BENCHMARKS_DIR.parent))

from benchmarks.machine import describe, spread  # noqa: E402
from stillframe.testing import run_ranks  # noqa: E402

WORLD_SIZE = 2
TOTAL_BYTES = 1 << 29
MATRICES = 8

Times = list[tuple[float, float]]


def measure(directory: Path, run_bytes: int, rounds: int) -> tuple[dict[str, Times], dict[str, int]]:
    """Of one rank: (stall, written) in seconds of each save, and the number of extents, by the way."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import stillframe
    from stillframe.layout import reshuffle

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    columns = WORLD_SIZE * run_bytes // 2
    rows = TOTAL_BYTES // MATRICES // (2 * columns)
    model = nn.Module()
    for number in range(MATRICES):
        values = torch.randn(rows, columns, dtype=torch.bfloat16)
        split = distribute_tensor(values, mesh, [Shard(1)], src_data_rank=None)
        model.register_parameter(f"matrix{number}", nn.Parameter(split))
    made = {}
    for way, direct_from_bytes in (("direct", 0), ("exchanged", 1 << 30)):
        reshuffle.DIRECT_FROM_BYTES = direct_from_bytes
        made[way] = stillframe.Checkpointer(directory / way, model=model, key_mapping={}, hf_max_keep=1)
    times: dict[str, Times] = {way: [] for way in made}
    for step in range(1 + rounds):
        for way, ckpt in made.items():
            dist.barrier()
            ckpt.save_hf(step)
            times[way].append((ckpt.reports[-1].stall_s, ckpt.reports[-1].written_s))
    extents = {}
    for way, ckpt in made.items():
        assert ckpt._frames is not None
        extents[way] = sum(len(file.extents) for plan in ckpt._frames._write_plans() for file in plan.files)
        ckpt.close()
    return {way: of_way[1:] for way, of_way in times.items()}, extents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run-kib", type=int, nargs="+", default=[4, 16, 64, 256], help="lengths of the runs")
    parser.add_argument("--directory", type=Path, default=None, help="where to write; a temporary directory if absent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillframe-bench-", dir=arguments.directory) as name:
        print(describe(Path(name)))
        print(f"{TOTAL_BYTES / 2**30:.2f} GiB on {WORLD_SIZE} ranks, {arguments.rounds} interleaved rounds")
        print(
            "\n| run, KiB | way | extents per rank | stall, s | written, s | median, GB/s |\n|---|---|---|---|---|---|"
        )
        for run_bytes in (kib << 10 for kib in arguments.run_kib):
            ranks = run_ranks(
                WORLD_SIZE, measure, Path(name) / str(run_bytes), run_bytes, arguments.rounds, timeout_s=900
            )
            for way in ("direct", "exchanged"):
                saves = list(zip(*(times[way] for times, _ in ranks), strict=True))
                stall, written = ([max(rank[field] for rank in save) for save in saves] for field in (0, 1))
                extents = max(count[way] for _, count in ranks)
                rate = f"{TOTAL_BYTES / median(written) / 1e9:.2f}"
                row = (str(run_bytes >> 10), way, str(extents), spread(stall), spread(written), rate)
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
