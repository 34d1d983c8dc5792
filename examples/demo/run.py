"""The demo: train a small Qwen3-MoE on two ranks, save it while it trains, check what was saved; kill it, and go on.

    python examples/demo/run.py [--dir runs/demo]

Everything is made on the spot and stays in that folder, which a later run of the demo replaces. The exit status is not
zero if any part fails: training, loading the export with plain Transformers, comparing it with an unsharded
`save_pretrained` file by file, or going on, bit by bit, after all processes were killed in the middle of a save.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from jobs import HERE, KillInSave, started
from screen import GREEN, RED, emphasized, paint, print_table, title

TOTAL_STEPS = 40
SAVE_INTERVAL = 10
KILL_STEP = 20
RANKS = 2
MARKER_NAME = ".stillframe-demo"
TRAINING_TIMEOUT_S = 900.0
CHECK_TIMEOUT_S = 300.0
LEAST_FALL = 2.0
"""The loss must fall by at least this many nats, from about ln(2048) = 7.6 at the start."""


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

    config_path = make_inputs(demo_dir, total_steps=TOTAL_STEPS, save_interval=SAVE_INTERVAL)
    print(f"in {demo_dir}, from the help topics of Python {platform.python_version()}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} CPU cores")

    title(f"2  Train on {RANKS} ranks with FSDP2, saving every {SAVE_INTERVAL} steps meanwhile")
    run_dir = demo_dir / "run"
    train(train_command(config_path), demo_dir / "train.log")
    steps, saves = read_metrics(run_dir)
    check_loss(steps)
    show_saves(steps, saves)

    latest_dir = run_dir / "hf-latest"
    title(f"3  Load {latest_dir} in a fresh process, with plain Transformers")
    generate(latest_dir)

    title(f"4  Compare it with save_pretrained of the same model, unsharded: {demo_dir / 'reference'}")
    compare(latest_dir, demo_dir / "reference")

    killed_dir = demo_dir / "killed"
    title(f"5  Train again, and kill every process, with SIGKILL, in the middle of the save of step {KILL_STEP}")
    command = [*train_command(config_path), "--set", f"run_dir={killed_dir}", "--set", "hooks=[]"]
    train_and_kill(command, demo_dir / "killed.log", killed_dir / f".checkpoint-{KILL_STEP}.incomplete")

    title("6  Start the same command again")
    train(command, demo_dir / "resumed.log")
    compare_steps(run_dir, killed_dir)
    compare(killed_dir / f"hf-{TOTAL_STEPS}", run_dir / f"hf-{TOTAL_STEPS}", of="the run that was never stopped")


def fresh_folder(demo_dir: Path) -> None:
    """Make the folder; one that an earlier demo made is replaced, anything else there is refused."""
    marker_path = demo_dir / MARKER_NAME
    if demo_dir.exists():
        if not marker_path.is_file():
            raise DemoFailed(f"{demo_dir} exists and was not made by this demo; move it, or give another --dir")
        shutil.rmtree(demo_dir)
    demo_dir.mkdir(parents=True)
    marker_path.write_text("Made by examples/demo/run.py, which replaces this folder when it runs again.\n")


def train_command(config_path: Path) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return [*launcher, "-m", "stillframe", "train", str(config_path)]


def train(command: list[str], log_path: Path) -> None:
    """Run `stillframe train` under torchrun; all it prints goes to the log, the telling lines to the screen."""
    print("$ torchrun", *command[3:], "\n")
    with started(command, timeout_s=TRAINING_TIMEOUT_S) as process, log_path.open("w") as log:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if is_telling(line):
                print(emphasized(line), end="", flush=True)
        status = process.wait()
    if status != 0:
        raise DemoFailed(f"training ended with exit status {status}; {end_of(log_path)}")


def train_and_kill(command: list[str], log_path: Path, hidden_dir: Path) -> None:
    """Run it, and SIGKILL all of it while it writes the checkpoint in `hidden_dir`."""
    print("$ torchrun", *command[3:], "\n")
    with started(command, timeout_s=TRAINING_TIMEOUT_S) as process, log_path.open("w") as log:
        assert process.stdout is not None
        kill = KillInSave(process, hidden_dir)
        kill.start()
        for line in process.stdout:
            log.write(line)
            if is_telling(line):
                print(emphasized(line), end="", flush=True)
        process.wait()
        kill.join()
    if not kill.killed:
        raise DemoFailed(f"the job ended by itself, before {hidden_dir} was seen; {end_of(log_path)}")
    print(f"\n{paint('SIGKILL', RED)} to {kill.killed} processes: launcher, ranks, writers.", end=" ")
    if kill.was_unpublished:
        print(f"{hidden_dir.name} stays behind, unfinished.")
    else:  # the disk was faster than we were; all that follows holds then, too
        print(f"The checkpoint of step {KILL_STEP} had been published an instant before.")


def end_of(log_path: Path) -> str:
    lines = log_path.read_text().splitlines()[-30:]
    return f"the end of {log_path}:\n" + "".join(f"  {line}\n" for line in lines)


def is_telling(line: str) -> bool:
    """All but the plain steps: the headline, every fifth step, steps with a save in flight, publications, resumes."""
    if line.startswith("step "):
        step = int(line[len("step ") :].split("/")[0])
        return step == 1 or step % 5 == 0 or not line.endswith("s/step\n")
    return line.startswith(("hf-", "checkpoint-", ".checkpoint-", "resumed", "Qwen3Moe"))


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Steps and saves. Of several lines of a step, before and after a resume, the last one counts."""
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = list({event["step"]: event for event in events if event["event"] == "step"}.values())
    saves = [event for event in events if event["event"] in ("hf_export", "checkpoint")]
    if [step["step"] for step in steps] != [*range(1, TOTAL_STEPS + 1)]:
        raise DemoFailed(f"{run_dir / 'metrics.jsonl'} has {len(steps)} steps")
    return steps, saves


def check_loss(steps: list[dict[str, Any]]) -> None:
    first, last = steps[0]["loss"], statistics.mean(step["loss"] for step in steps[-5:])
    print(f"\nloss {first:.2f} at the start, {last:.2f} over the last 5 steps")
    if not last < first - LEAST_FALL:
        raise DemoFailed(f"the loss fell from {first:.2f} to {last:.2f} only; expected a fall of {LEAST_FALL}")


def show_saves(steps: list[dict[str, Any]], saves: list[dict[str, Any]]) -> None:
    """One row per save: how long training stood still for it, next to how long a training step takes."""
    if len(saves) != 2 * TOTAL_STEPS // SAVE_INTERVAL:
        raise DemoFailed(f"{len(saves)} saves were published")
    # The first steps are slower for reasons of their own: threads, allocator, connections.
    settled = steps[3:]
    alone_s = statistics.median(step["step_s"] for step in settled if not step["saving"])
    saving = [step["step_s"] for step in settled if step["saving"]]
    rows = [["save", "staged by rank 0", "stall", "of a step", "written", "published", "known at"]]
    for save in saves:
        rows.append(
            [
                Path(save["path"]).name,
                f"{save['staged_bytes'] / 1e6:.1f} MB" if save["event"] == "checkpoint" else "the same",
                f"{save['stall_s'] * 1e3:.0f} ms" if save["event"] == "checkpoint" else "the same",
                f"{save['stall_s'] / alone_s:.1%}" if save["event"] == "checkpoint" else "",
                f"{save['written_s']:.2f} s",
                f"{save['published_s']:.2f} s",
                f"step {save['seen_at_step']}",
            ]
        )
    print(f"one training step: {alone_s:.2f} s", end="")
    print(f"; with a save in flight: {statistics.median(saving):.2f} s\n" if saving else "\n")
    print_table(rows, align="lrrrrrr")
    print("A checkpoint and an export of one step are copied together, once, and written one after the other.")
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


def compare(export_dir: Path, expected_dir: Path, *, of: str = "save_pretrained") -> None:
    """sha256 of every file; the manifests of stillframe say when they were written, and are left out."""
    expected, found = digests(expected_dir), digests(export_dir)
    rows = [["file", "bytes", "sha256 of the export", of]]
    different = []
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = found.get(name), expected.get(name)
        is_manifest = name == "stillframe.json"
        if ours != theirs and not is_manifest:
            different.append(name)
        verdict = "identical" if ours == theirs else "(stillframe's manifest)" if is_manifest else "DIFFERENT"
        if theirs is None and not is_manifest:
            verdict = "NOT THERE"
        size = f"{(export_dir / name).stat().st_size:,}" if ours else "-"
        rows.append([name, size, ours[:32] if ours else "NOT THERE", verdict])
    print_table(rows, align="lrll")
    if different:
        raise DemoFailed(f"{export_dir} and {expected_dir} differ in {', '.join(different)}")


def compare_steps(expected_dir: Path, resumed_dir: Path) -> None:
    """Loss and gradient norm of each step: those of the run that was killed, to the last bit those of the other."""
    expected, resumed = read_metrics(expected_dir)[0], read_metrics(resumed_dir)[0]
    rows = [["step", "loss, never stopped", "loss, killed and resumed", ""]]
    different = []
    for one, other in zip(expected, resumed, strict=True):
        is_equal = (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
        if not is_equal:
            different.append(one["step"])
        if one["step"] % 5 == 0 or not is_equal:
            rows.append(
                [str(one["step"]), repr(one["loss"]), repr(other["loss"]), "equal" if is_equal else "DIFFERENT"]
            )
    print()
    print_table(rows, align="rrrl")
    if different:
        raise DemoFailed(f"losses or gradient norms differ at steps {', '.join(map(str, different))}")
    print(f"{paint('equal', GREEN)} to the last bit: loss and gradient norm of all {len(expected)} steps\n")


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file below, by relative path."""
    result = {}
    for path in sorted(path for path in directory.resolve().rglob("*") if path.is_file()):
        with path.open("rb") as file:
            result[str(path.relative_to(directory.resolve()))] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


if __name__ == "__main__":
    sys.exit(main())
