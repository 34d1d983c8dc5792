"""Planning an export at scale: time, memory and balance of a rank's layout, from 8 to 16,384 ranks.

    .venv/bin/python benchmarks/planning.py [--quick] [--json FILE] [--svg FILE]

Models of up to a trillion parameters and their meshes are simulated (`benchmarks/simulated.py`). What is timed is the
whole of `plan_huggingface`, as the first save of a job runs it; each measurement has a process of its own, in which
nothing has been planned before. `--quick` measures one model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

BENCHMARKS_DIR = Path(__file__).parent
sys.path.insert(0, str(BENCHMARKS_DIR.parent))

from benchmarks.machine import describe  # noqa: E402
from benchmarks.plot import Line, line_plot  # noqa: E402
from benchmarks.simulated import (  # noqa: E402
    DISTRIBUTIONS,
    MODELS,
    bytes_of_ranks,
    distribute,
    on_meta,
    refuse_another_distribution,
)
from stillframe.layout.huggingface import plan_huggingface  # noqa: E402
from stillframe.testing.playing import playing  # noqa: E402

WORLD_SIZES = (8, 256, 4096, 16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    model: str
    distribution: str
    world_size: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one rank's plan took and what is in it. `memory_bytes`: how far the process grew meanwhile, at most."""

    plan_s: float
    cpu_s: float
    memory_bytes: int
    keys: int
    files: int
    extents: int
    copies: int
    own_bytes: int
    total_bytes: int
    header_bytes: tuple[int, ...]
    index_bytes: int
    digest: str


_models: dict[str, PreTrainedModel] = {}


def cases(quick: bool) -> Iterator[Case]:
    for model in list(MODELS)[: 1 if quick else None]:
        for distribution in DISTRIBUTIONS:
            for world_size in WORLD_SIZES:
                if distribution == "HSDP" and world_size <= 64:
                    continue
                for rank in (0, world_size // 2, world_size - 1):
                    yield Case(model=model, distribution=distribution, world_size=world_size, rank=rank)


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(case: Case) -> Figures:
    model = _models[case.model]
    with playing(case.rank, case.world_size):
        distribute(model, DISTRIBUTIONS[case.distribution](case.world_size))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is in use
        before = status_bytes("VmRSS")
        begin, begin_cpu = time.perf_counter(), time.process_time()
        plan = plan_huggingface(
            model,
            max_shard_bytes=50_000_000_000,
            rank=case.rank,
            world_size=case.world_size,
            plan_id=1,
        )
        plan_s, cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
        memory_bytes = status_bytes("VmHWM") - before
    files = plan.share.plan.files
    return Figures(
        plan_s=plan_s,
        cpu_s=cpu_s,
        memory_bytes=memory_bytes,
        keys=sum(len(file.items) - 1 for file in plan.layout.files),
        files=len(plan.layout.files),
        extents=sum(len(file.extents) for file in files),
        copies=len(plan.share.copies),
        own_bytes=sum(extent.length_bytes for file in files for extent in file.extents),
        total_bytes=plan.layout.total_bytes,
        header_bytes=tuple(file.items[0].length_bytes for file in plan.layout.files),
        index_bytes=sum(len(file.content) for file in plan.layout.inline_files),
        digest=plan.layout.digest,
    )


def in_own_process(case: Case) -> Figures:
    """`measure` in a fresh copy of this process, in which nothing is cached yet."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(measure(case)))
    process.start()
    sender.close()
    try:
        figures: Figures = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{case}: its process ended with {process.exitcode}") from None
    process.join()
    return figures


def balance(case: Case, figures: Figures) -> float:
    """The largest rank's bytes / the mean, of all ranks: weights by the sizes of the shards, and headers."""
    with playing(0, case.world_size):
        place = DISTRIBUTIONS[case.distribution](case.world_size)
        own = bytes_of_ranks(_models[case.model], place, case.world_size)
    for file, header in enumerate(figures.header_bytes):
        own[file % case.world_size] += header
    # Replicas cut on pages, and plain buffers are rank 0's.
    slack = 1e-3 * figures.total_bytes / case.world_size + (1 << 20)
    assert abs(own[case.rank] - figures.own_bytes) < slack, f"{case} writes {figures.own_bytes}, not {own[case.rank]}"
    return float(own.max() / own.mean())


def table(results: Sequence[tuple[Case, Figures, float]]) -> list[str]:
    """One row for each model, distribution and number of ranks: the slowest of its ranks, and what the ranks hold."""
    lines = [
        "| model | distribution | ranks | plan, s | its CPU, s | memory, MiB | largest / mean | extents | copies |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, int], list[tuple[Case, Figures, float]]] = {}
    for result in results:
        case = result[0]
        groups.setdefault((case.model, case.distribution, case.world_size), []).append(result)
    for (model, distribution, world_size), group in groups.items():
        figures = [figures for _, figures, _ in group]
        assert len({f.digest for f in figures}) == 1, "ranks disagree on the layout"
        lines.append(
            f"| {model} | {distribution} | {world_size:,} | {max(f.plan_s for f in figures):.2f} "
            f"| {max(f.cpu_s for f in figures):.2f} "
            f"| {max(f.memory_bytes for f in figures) / 2**20:.0f} | {group[0][2]:.3g} "
            f"| {low_to_high([f.extents for f in figures])} | {low_to_high([f.copies for f in figures])} |"
        )
    return lines


def low_to_high(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def files_table(results: Sequence[tuple[Case, Figures, float]]) -> list[str]:
    lines = ["| model | TB | keys | files | largest header, kB | index, kB |", "|---|---|---|---|---|---|"]
    for model, f in {case.model: figures for case, figures, _ in results}.items():
        lines.append(
            f"| {model} | {f.total_bytes / 1e12:.2f} | {f.keys:,} | {f.files} | {max(f.header_bytes) / 1e3:,.0f} "
            f"| {f.index_bytes / 1e3:,.0f} |"
        )
    return lines


def plot(results: Sequence[tuple[Case, Figures, float]]) -> str:
    """Processor seconds by ranks, a line for each model: the median of the measured ranks of all distributions."""
    lines = []
    for model in {case.model: None for case, _, _ in results}:
        seconds: dict[int, list[float]] = {}
        for case, figures, _ in results:
            if case.model == model:
                seconds.setdefault(case.world_size, []).append(figures.cpu_s)
        points = tuple((ranks, median(values)) for ranks, values in sorted(seconds.items()))
        lines.append(Line(name=model, points=points))
    return line_plot(lines, title="Planning an export: processor time of one rank", x="ranks", y="seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model instead of four")
    parser.add_argument("--json", type=Path, help="also write all figures of all ranks there")
    parser.add_argument("--svg", type=Path, help="also draw the times there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    refuse_another_distribution(MODELS["Qwen3-30B-A3B"](), "FSDP", 8)
    refuse_another_distribution(MODELS["Qwen3-30B-A3B"](), "FSDP x EP", 8)
    refuse_another_distribution(MODELS["Qwen3-30B-A3B"](), "FSDP x EP", 256)
    refuse_another_distribution(MODELS["Qwen3-30B-A3B"](), "HSDP", 128)
    planned = list(cases(arguments.quick))
    for model in {case.model: None for case in planned}:
        _models[model] = on_meta(MODELS[model]())
    results = []
    for number, case in enumerate(planned):
        print(f"{number + 1} of {len(planned)}: {case}", file=sys.stderr)
        figures = in_own_process(case)
        results.append((case, figures, balance(case, figures)))
    hardware = describe(Path())
    print(hardware, "", *table(results), "", *files_table(results), sep="\n")
    if arguments.json is not None:
        listed = [asdict(case) | asdict(f) | {"balance": b} for case, f, b in results]
        arguments.json.write_text(json.dumps({"machine": hardware, "figures": listed}, indent=1) + "\n")
    if arguments.svg is not None:
        arguments.svg.write_text(plot(results))


if __name__ == "__main__":
    main()
