"""`stillframe`: the commands, their help, and how errors reach the shell.

Exit status: 0 done; 2 what was asked for is wrong (one line on stderr says what); 130 interrupted; 143 a training that
was preempted, and is to be started again; 1 damage that `verify` found (a line each), and anything else, with its
traceback. Each command imports what it needs when it runs, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from stillframe import __version__
from stillframe.errors import CorruptCheckpoint, LayoutError, LoadError, OptionError, RunDirectoryError
from stillframe.notice import PREEMPTED_STATUS

USER_ERRORS = (OptionError, RunDirectoryError, LayoutError, LoadError)
"""What the user can put right; their messages say how, so a traceback would only hide them."""

LOCAL_RANK_ZERO_SPEAKS_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.command(arguments)
    except (*USER_ERRORS, KeyboardInterrupt) as error:
        if not isinstance(error, KeyboardInterrupt):
            _report(f"stillframe {arguments.name}: error: {error}")
            return 2
        if _local_rank() == 0:
            sys.stderr.write(f"stillframe {arguments.name}: interrupted\n")
        return 130
    return status


def _report(line: str) -> None:
    """Write one line to stderr, once per host: local rank 0 speaks, and its end makes the launcher end the others.

    A rank that is still there after `LOCAL_RANK_ZERO_SPEAKS_S` is alone with its error, and says it itself.
    """
    local_rank = _local_rank()
    if local_rank != 0:
        time.sleep(LOCAL_RANK_ZERO_SPEAKS_S)
        line = f"[local rank {local_rank}] {line}"
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _local_rank() -> int:
    """As the launcher counts this host's ranks; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillframe",
        description="Asynchronous, crash-safe checkpoints for distributed PyTorch training.",
    )
    parser.add_argument("--version", action="version", version=f"stillframe {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_list(commands)
    _add_inspect(commands)
    _add_verify(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a Transformers model, saving it meanwhile; go on after a stop",
        description=(
            "Train the model of CONFIG.toml. Meanwhile save it as Hugging Face checkpoints RUN_DIR/hf-STEP and, with a "
            "[checkpoint] section, what it takes to go on: started again with the same command, it goes on from there. "
            "On several devices or processes, start it with torchrun:\n\n"
            "  torchrun --nproc-per-node 8 -m stillframe train CONFIG.toml\n\n"
            "Without torchrun it trains in this process alone."
        ),
        epilog="The keys of CONFIG.toml, what rank 0 prints and what it leaves in RUN_DIR: docs/trainer.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="the configuration")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, such as training.total_steps=100; the value is TOML, or else a plain string; repeatable",
    )
    parser.set_defaults(command=_train)


def _train(arguments: argparse.Namespace) -> int:
    from stillframe.train.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    from stillframe.train.loop import train  # after the configuration is known to be right: it imports torch

    return 0 if train(config) else PREEMPTED_STATUS


def _add_list(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "list",
        help="list the published checkpoints of a run directory",
        description=(
            "List the exports, checkpoints and snapshots of RUN_DIR that are published, and so complete; the latest is "
            "last. Times are local."
        ),
        epilog="What is kept, and the fields of --json: docs/retention.md.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run directory")
    parser.add_argument("--json", action="store_true", help="print a JSON array, for programs")
    parser.set_defaults(command=_list)


def _list(arguments: argparse.Namespace) -> int:
    from stillframe.cli.listing import checkpoints_as_json, format_checkpoints

    sys.stdout.write((checkpoints_as_json if arguments.json else format_checkpoints)(arguments.run_dir))
    return 0


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what is in an export or a checkpoint",
        description=(
            "Print where the export, checkpoint or snapshot DIR comes from, what it holds and how its ranks shared it; "
            "from headers and stillframe.json, without reading tensors. Also for directories that others wrote."
        ),
        epilog="The fields of --json: docs/format.md.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the directory, or a link to it")
    parser.add_argument("--tensors", action="store_true", help="print a line for each tensor")
    parser.add_argument("--json", action="store_true", help="print a JSON array with every tensor, for programs")
    parser.set_defaults(command=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from stillframe.cli.inspecting import format_inspected, inspect, inspected_as_json

    found = inspect(arguments.directory)
    sys.stdout.write(inspected_as_json(found) if arguments.json else format_inspected(found, tensors=arguments.tensors))
    return 0


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare checkpoints, byte for byte, with what was published",
        description=(
            "Read every byte of the exports, checkpoints or snapshots DIR and compare it with the checksums in their "
            "stillframe.json; check headers and coverage. Exit status 1 if any of them is not what was published."
        ),
        epilog="What is compared: docs/format.md. What to do about damage: docs/checkpoints.md.",
    )
    parser.add_argument(
        "directories", type=Path, nargs="+", metavar="DIR", help="a published directory, or a link to one"
    )
    parser.set_defaults(command=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from stillframe.cli.listing import format_size
    from stillframe.load.verifying import verify

    status = 0
    for directory in arguments.directories:
        try:
            found = verify(directory)
        except CorruptCheckpoint as error:
            _report(f"damaged: {error}")
            status = 1
        else:
            size = format_size(found.bytes_read)
            sys.stdout.write(f"whole: {directory}: {found.files} files, {found.tensors} tensors, {size}\n")
    return status
