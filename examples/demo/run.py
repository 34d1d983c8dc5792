"""The demo: train a small Qwen3-MoE on two ranks, export it while it trains, and check what was exported.

    python examples/demo/run.py [--dir runs/demo]

Everything is made on the spot and stays in that folder, which a later run of the demo replaces. The exit status is not
zero if any part fails: training, loading the export with plain Transformers, or comparing it with an unsharded
`save_pretrained`, file by file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from screen import GREEN, RED, emphasized, paint, print_table, title

TOTAL_STEPS = 80
HF_INTERVAL = 10
RANKS = 2
MARKER_NAME = ".stillframe-demo"
TRAINING_TIMEOUT_S = 900.0
CHECK_TIMEOUT_S = 300.0
END_TIMEOUT_S = 45.0
"""More than the 30 s that torchrun gives its ranks between SIGTERM and SIGKILL."""
LEAST_FALL = 3.0
"""The loss must fall by at least this many nats, from about ln(2048) = 7.6 at the start."""

HERE = Path(__file__).resolve().parent


class DemoFailed(Exception):
    """A part of the demo did not do what it shows; the message says which and why."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, export meanwhile, and check the export.")
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="the demo's folder, replaced if it is one")
    # What a barely trained model writes may be any bytes, and a terminal may take ASCII only.
    sys.stdout.reconfigure(errors="replace")
    demo_dir = parser.parse_args().dir
    started_s = time.perf_counter()
    try:
        demo(demo_dir)
    except DemoFailed as error:
        print(f"{paint('demo failed', RED)}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo interrupted", file=sys.stderr)
        return 130
    took_s = time.perf_counter() - started_s
    print(f"\n{paint('all checks passed', GREEN)} in {took_s:.0f} s; the exports: {demo_dir / 'run'}")
    return 0


def demo(demo_dir: Path) -> None:
    title("1  Make a tokenizer, data and a configuration")
    fresh_folder(demo_dir)
    import torch
    import transformers
    from inputs import make_inputs

    config_path = make_inputs(demo_dir, total_steps=TOTAL_STEPS, hf_interval=HF_INTERVAL)
    print(f"in {demo_dir}, from the help topics of Python {platform.python_version()}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} CPU cores")

    title(f"2  Train on {RANKS} ranks with FSDP2, exporting every {HF_INTERVAL} steps meanwhile")
    train(config_path, demo_dir / "train.log")
    steps, exports = read_metrics(demo_dir / "run" / "metrics.jsonl")
    check_loss(steps)
    show_exports(steps, exports)

    latest_dir = demo_dir / "run" / "hf-latest"
    title(f"3  Load {latest_dir} in a fresh process, with plain Transformers")
    generate(latest_dir)

    title(f"4  Compare it with save_pretrained of the same model, unsharded: {demo_dir / 'reference'}")
    compare(latest_dir, demo_dir / "reference")


def fresh_folder(demo_dir: Path) -> None:
    """Make the folder; one that an earlier demo made is replaced, anything else there is refused."""
    marker_path = demo_dir / MARKER_NAME
    if demo_dir.exists():
        if not marker_path.is_file():
            raise DemoFailed(f"{demo_dir} exists and was not made by this demo; move it, or give another --dir")
        shutil.rmtree(demo_dir)
    demo_dir.mkdir(parents=True)
    marker_path.write_text("Made by examples/demo/run.py, which replaces this folder when it runs again.\n")


def train(config_path: Path, log_path: Path) -> None:
    """Run `stillframe train` under torchrun; all it prints goes to the log, the telling lines to the screen."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [*launcher, "-m", "stillframe", "train", str(config_path)]
    print("$ torchrun", *command[3:], "\n")
    with started(command, timeout_s=TRAINING_TIMEOUT_S) as process, log_path.open("w") as log:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if is_telling(line):
                print(emphasized(line), end="", flush=True)
        status = process.wait()
    if status != 0:
        tail = "".join(f"  {line}\n" for line in log_path.read_text().splitlines()[-30:])
        raise DemoFailed(f"training ended with exit status {status}; the end of {log_path}:\n{tail}")


@contextlib.contextmanager
def started(command: list[str], *, timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    """A child process, which is gone on exit, and after `timeout_s` in any case; its stderr comes with its stdout."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONIOENCODING": "utf-8",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    process = subprocess.Popen(
        command,
        env=environment,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that an interrupt from the keyboard reaches this process alone, which then ends it
    )
    watchdog = threading.Timer(timeout_s, end, [process])
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """SIGTERM, at which torchrun ends its ranks (they are in sessions of their own), then SIGKILL."""
    process.terminate()
    try:
        process.wait(timeout=END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=END_TIMEOUT_S)


def is_telling(line: str) -> bool:
    """All but the plain steps: the headline, every fifth step, steps with a save in flight, publications."""
    if line.startswith("step "):
        step = int(line[len("step ") :].split("/")[0])
        return step == 1 or step % 5 == 0 or "hf-" in line
    return line.startswith(("hf-", "Qwen3Moe"))


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    events = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    exports = [event for event in events if event["event"] == "hf_export"]
    if len(steps) != TOTAL_STEPS or len(exports) != TOTAL_STEPS // HF_INTERVAL:
        raise DemoFailed(f"{path} has {len(steps)} steps and {len(exports)} exports")
    return steps, exports


def check_loss(steps: list[dict[str, Any]]) -> None:
    first, last = steps[0]["loss"], statistics.mean(step["loss"] for step in steps[-5:])
    print(f"\nloss {first:.2f} at the start, {last:.2f} over the last 5 steps")
    if not last < first - LEAST_FALL:
        raise DemoFailed(f"the loss fell from {first:.2f} to {last:.2f} only; expected a fall of {LEAST_FALL}")


def show_exports(steps: list[dict[str, Any]], exports: list[dict[str, Any]]) -> None:
    """One row per export: how long training stood still for it, next to how long a training step takes."""
    # The first steps are slower for reasons of their own: threads, allocator, connections.
    settled = steps[3:]
    alone_s = statistics.median(step["step_s"] for step in settled if not step["saving"])
    saving = [step["step_s"] for step in settled if step["saving"]]
    rows = [["export", "staged by rank 0", "stall", "of a step", "written", "published", "known at"]]
    for export in exports:
        rows.append(
            [
                f"hf-{export['step']}",
                f"{export['staged_bytes'] / 1e6:.1f} MB",
                f"{export['stall_s'] * 1e3:.0f} ms",
                f"{export['stall_s'] / alone_s:.1%}",
                f"{export['written_s']:.2f} s",
                f"{export['published_s']:.2f} s",
                f"step {export['seen_at_step']}",
            ]
        )
    print(f"one training step: {alone_s:.2f} s", end="")
    print(f"; with a save in flight: {statistics.median(saving):.2f} s\n" if saving else "\n")
    print_table(rows, align="lrrrrrr")
    print("stall: training stood still. written: on disk, synced. published: complete, under its name; after the call.")


def generate(checkpoint_dir: Path) -> None:
    """Load and generate in a process that cannot import stillframe."""
    with started(
        [sys.executable, str(HERE / "generate.py"), str(checkpoint_dir)], timeout_s=CHECK_TIMEOUT_S
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
        status = process.wait()
    if status != 0:
        raise DemoFailed(f"loading and generating ended with exit status {status}")


def compare(export_dir: Path, reference_dir: Path) -> None:
    """sha256 of every file; the export may have one more, stillframe's manifest."""
    expected, found = digests(reference_dir), digests(export_dir)
    rows = [["file", "bytes", "sha256 of the export", "save_pretrained"]]
    different = []
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = found.get(name), expected.get(name)
        is_manifest = name == "stillframe.json" and theirs is None
        if ours != theirs and not is_manifest:
            different.append(name)
        verdict = "identical" if ours == theirs else "(stillframe's manifest)" if is_manifest else "DIFFERENT"
        if theirs is None and not is_manifest:
            verdict = "NOT THERE"
        size = f"{(export_dir / name).stat().st_size:,}" if ours else "-"
        rows.append([name, size, ours[:32] if ours else "NOT THERE", verdict])
    print_table(rows, align="lrll")
    if different:
        raise DemoFailed(f"{export_dir} and {reference_dir} differ in {', '.join(different)}")


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file below, by relative path."""
    result = {}
    for path in sorted(path for path in directory.resolve().rglob("*") if path.is_file()):
        with path.open("rb") as file:
            result[str(path.relative_to(directory.resolve()))] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


if __name__ == "__main__":
    sys.exit(main())
