"""A checkpoint of model and AdamW, more than 3 GiB from 2 ranks: stillframe, `dcp.save`, `dcp.async_save`, the limits.

    .venv/bin/python benchmarks/checkpoint.py [--rounds 5] [--hidden 1376] [--directory DIR]

Every round does, one after the other on both ranks at once: a memcpy of the rank's own bytes, a bare durable write of
as many, and a save by each system, from the call to durable, with nothing else running. Ratios are formed within a
round. The first round, in which every system makes what it uses again later, is reported apart.

stall: the call, until training could go on; torch's `get_state_dict` is a part of its users' call. written: this
rank's files are fsynced (torch does not say when). durable: all files are; of stillframe, published. memory: the most
that a rank's process and its children used in two saves more than before them (PSS, sampled), divided by the rank's
bytes; each system in processes of its own, and apart from the times, because sampling slows the copies.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch.distributed as dist

BENCHMARKS_DIR = Path(__file__).parent
sys.path.insert(0, str(BENCHMARKS_DIR.parent))

from benchmarks.limits import BareWrite, WarmCopy  # noqa: E402
from benchmarks.machine import describe, end_cleanly_when_told_to, pss_bytes, spread  # noqa: E402
from stillframe.testing import run_ranks  # noqa: E402

WORLD_SIZE = 2
SYSTEMS = ("stillframe", "dcp.save", "dcp.async_save, thread", "dcp.async_save, process")
_SAMPLE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One rank's figures of one save: seconds since the call."""

    stall_s: float
    written_s: float | None
    durable_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    memcpy_s: float
    bare_write_s: float
    saves: dict[str, Figures]


class Training(Protocol):
    model: Any
    optimizer: Any


class PeakMemory:
    """The most that this process and its descendants use while inside, above what they used before."""

    def __init__(self) -> None:
        self._before = family_bytes()
        self._most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def extra_bytes(self) -> int:
        return max(0, self._most - self._before)

    def _sample(self) -> None:
        while True:
            self._most = max(self._most, family_bytes())
            if self._over.wait(_SAMPLE_S):
                return


def family_bytes() -> int:
    """PSS of this process and all its descendants, those that end meanwhile left out."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            total += pss_bytes(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                waiting += map(int, children.read_text().split())
        except (OSError, RuntimeError):
            continue
    return total


class Stillframe:
    def __init__(self, directory: Path, training: Training) -> None:
        import stillframe

        self._ckpt = stillframe.Checkpointer(
            directory / "stillframe",
            model=training.model,
            optimizer=training.optimizer,
            hf_export=False,
            checkpoint_maxkeep=1,
        )

    def save(self, step: int) -> Callable[[], Any]:
        return self._ckpt.async_save(step).result

    def written_s(self) -> float | None:
        return float(self._ckpt.reports[-1].written_s)

    def settle(self) -> None:
        """Wait until superseded checkpoints are gone, which the next save would wait for."""
        while self._ckpt.in_flight is not None:
            time.sleep(0.01)

    def close(self) -> None:
        self._ckpt.close()


class TorchDcp:
    """`how`: "save", or the kind of background that `async_save` uses."""

    def __init__(self, directory: Path, training: Training, how: str) -> None:
        self._directory = directory / how
        self._training = training
        self._how = how
        self._past: list[Path] = []

    def save(self, step: int) -> Callable[[], Any]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        model, optimizer = get_state_dict(self._training.model, self._training.optimizer)
        state = {"model": model, "optimizer": optimizer}
        place = self._directory / str(step)
        self._past.append(place)
        if self._how == "save":
            dcp.save(state, checkpoint_id=place)
            return lambda: None
        kind = AsyncCheckpointerType.PROCESS if self._how == "process" else AsyncCheckpointerType.THREAD
        future: Any = dcp.async_save(state, checkpoint_id=place, async_checkpointer_type=kind)
        return future.result  # type: ignore[no-any-return]

    def written_s(self) -> float | None:
        return None

    def settle(self) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            for old in self._past[:-1]:
                shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        pass


def make_training(hidden: int) -> Any:
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import Qwen3Config, Qwen3ForCausalLM

    class Made:
        def __init__(self) -> None:
            config = Qwen3Config(
                vocab_size=32768,
                hidden_size=hidden,
                intermediate_size=3 * hidden,
                num_hidden_layers=8,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=96,
                tie_word_embeddings=False,
            )
            self.model: Any = Qwen3ForCausalLM(config)
            for layer in self.model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
            for parameter in self.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()

        def own_tensors(self) -> list[torch.Tensor]:
            states = [v for state in self.optimizer.state.values() for v in state.values()]
            everything = [*self.model.parameters(), *states]
            return [t.to_local() if hasattr(t, "to_local") else t for t in everything]

    return Made()


def make_system(name: str, directory: Path, training: Training) -> Any:
    if name == "stillframe":
        return Stillframe(directory, training)
    return TorchDcp(directory, training, how=name.split()[-1].removeprefix("dcp."))


def measure_times(directory: Path, rounds: int, hidden: int) -> tuple[int, list[Round]]:
    training = make_training(hidden)
    copy = WarmCopy(training.own_tensors(), buffer_bytes=512 << 20)
    bare = BareWrite(directory / f"bare-{dist.get_rank()}", copy.total_bytes)
    copy.seconds()
    bare.seconds()
    systems: dict[str, Any] = {}
    results = []
    for number in range(1 + rounds):
        dist.barrier()
        memcpy_s = copy.seconds()
        dist.barrier()
        bare_write_s = bare.seconds()
        saves = {}
        for name in SYSTEMS:
            if name not in systems:
                systems[name] = make_system(name, directory, training)
            dist.barrier()
            begin = time.perf_counter()
            wait = systems[name].save(number)
            stall_s = time.perf_counter() - begin
            wait()
            durable_s = time.perf_counter() - begin
            saves[name] = Figures(stall_s=stall_s, written_s=systems[name].written_s(), durable_s=durable_s)
            systems[name].settle()
        results.append(Round(memcpy_s=memcpy_s, bare_write_s=bare_write_s, saves=saves))
    for system in systems.values():
        system.close()
    return copy.total_bytes, results


def measure_memory(directory: Path, name: str, hidden: int) -> int:
    training = make_training(hidden)
    dist.barrier()
    with PeakMemory() as memory:
        system = make_system(name, directory, training)
        for number in range(2):
            system.save(number)()
            system.settle()
        system.close()
    return memory.extra_bytes


def report(found: list[tuple[int, list[Round]]], memory_bytes: dict[str, list[int]], directory: Path) -> str:
    """The table. A save's time is that of its slower rank; a ratio is formed within its round."""
    sizes = [size for size, _ in found]
    rounds = list(zip(*(results for _, results in found), strict=True))
    first, later = rounds[0], rounds[1:]

    def slowest(field: str) -> list[float]:
        return [max(getattr(rank, field) for rank in ranks) for ranks in later]

    memcpy, bare = slowest("memcpy_s"), slowest("bare_write_s")
    lines = [
        describe(directory),
        f"{sum(sizes) / 2**30:.2f} GiB of float32 weights and AdamW state on {len(found)} ranks, {len(later)} "
        "interleaved rounds after the first; median (minimum to maximum)",
        "",
        f"memcpy of the rank's bytes {spread(memcpy)} s; bare write + fsync of as many {spread(bare)} s",
        "",
        "| system | stall, s | / memcpy | written, s | durable, s | / bare write | memory / bytes "
        "| first: stall, durable, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SYSTEMS:
        stall = [max(rank.saves[name].stall_s for rank in ranks) for ranks in later]
        durable = [max(rank.saves[name].durable_s for rank in ranks) for ranks in later]
        written = [[rank.saves[name].written_s for rank in ranks] for ranks in later]
        memory = max(extra / size for extra, size in zip(memory_bytes[name], sizes, strict=True))
        apart = [max(getattr(rank.saves[name], field) for rank in first) for field in ("stall_s", "durable_s")]
        lines.append(
            f"| {name} | {spread(stall)} | {spread([s / m for s, m in zip(stall, memcpy, strict=True)], 2)} "
            f"| {'-' if None in written[0] else spread([max(ranks) for ranks in written], 2)} | {spread(durable, 2)} "
            f"| {spread([d / b for d, b in zip(durable, bare, strict=True)], 2)} "
            f"| {memory:.2f} | {apart[0]:.2f}, {apart[1]:.2f} |"
        )
    rate = sum(sizes) / median(bare) / 1e9
    return "\n".join([*lines, "", f"the bare write in the median round: {rate:.2f} GB/s"])


def main() -> None:
    end_cleanly_when_told_to()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1376, help="width of the model; 1376 makes 3.1 GiB")
    parser.add_argument("--directory", type=Path, default=None, help="where to write; a temporary directory if absent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillframe-bench-", dir=arguments.directory) as directory:
        path = Path(directory)
        memory_bytes = {
            name: run_ranks(WORLD_SIZE, measure_memory, path / "memory" / str(number), name, arguments.hidden)
            for number, name in enumerate(SYSTEMS)
        }
        shutil.rmtree(path / "memory")
        found = run_ranks(WORLD_SIZE, measure_times, path, arguments.rounds, arguments.hidden, timeout_s=1500)
        print(report(found, memory_bytes, path))


if __name__ == "__main__":
    main()
