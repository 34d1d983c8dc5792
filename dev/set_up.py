"""Make the project's virtual environment; the Makefile calls this, with any Python from 3.11 on.

Only the standard library is used here: nothing else is there yet. Everything is pinned by constraints.txt. A machine
without an NVIDIA driver is meant to get the CPU build of torch, not the CUDA build with its gigabytes of libraries;
which of the two pip would take is asked before anything is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

ROOT_DIR = Path(__file__).resolve().parent.parent
CONSTRAINTS_PATH = ROOT_DIR / "constraints.txt"

NOT_THE_CPU_BUILD = """\
{torch} would be installed as its CUDA build: gigabytes that a machine without an NVIDIA driver has no use for.
Nothing was installed. Either name a package index that has the CPU build; PyTorch's page on installation shows one
for Linux, pip, CPU:
    make {goal} PIP_ARGS="--index-url THAT_INDEX --extra-index-url YOUR_USUAL_INDEX"
or take the CUDA build all the same:
    make {goal} TORCH_BUILD=any"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv_dir", type=Path)
    parser.add_argument("--goal", default="setup", help="the make target to name in messages")
    parser.add_argument("--pip-args", default="", help="further arguments for `pip install`, as one string")
    parser.add_argument("--torch-build", choices=["auto", "any"], default="auto", help="any: take what pip finds")
    options = parser.parse_args()
    pip_args = shlex.split(options.pip_args)

    python = make_venv(options.venv_dir)
    torch = pinned("torch")
    if options.torch_build == "auto" and not has_nvidia_driver() and needs_cuda(python, torch, pip_args):
        sys.exit(NOT_THE_CPU_BUILD.format(torch=torch, goal=options.goal))
    print(f"Installing stillframe, {torch} and the tools for development into {options.venv_dir}, once.", flush=True)
    pip_install(python, "-c", str(CONSTRAINTS_PATH), "-e", f"{ROOT_DIR}[dev]", *pip_args, timeout_s=1800)
    print(f"Installed {describe_torch(python)}.", flush=True)


def make_venv(venv_dir: Path) -> Path:
    """Its interpreter. An environment is kept while its interpreter runs, else made anew."""
    python = venv_dir.absolute() / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        venv.create(venv_dir, clear=True, with_pip=True)
    return python


def pinned(name: str) -> str:
    """The requirement that the constraints file has for a distribution, such as torch==2.13.0."""
    match = re.search(rf"^{re.escape(name)}==\S+", CONSTRAINTS_PATH.read_text(), re.MULTILINE)
    if match is None:
        sys.exit(f"{CONSTRAINTS_PATH.name} does not pin {name}")
    return match[0]


def has_nvidia_driver() -> bool:
    """Whether torch would find a driver: Linux's module, or the one that WSL passes through."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()


def needs_cuda(python: Path, requirement: str, pip_args: list[str]) -> bool:
    """Whether the build that pip would install depends on NVIDIA's packages."""
    resolve = ["--dry-run", "--no-deps", "--ignore-installed", "--report", "-", requirement]
    report = json.loads(pip_install(python, *resolve, *pip_args, timeout_s=300))
    dependencies = report["install"][0]["metadata"].get("requires_dist", [])
    return any(re.match(r"(nvidia|cuda)-", dependency) for dependency in dependencies)


def pip_install(python: Path, *arguments: str, timeout_s: float) -> str:
    """What pip printed. Its errors go to the terminal, and end this program."""
    command = [python, "-m", "pip", "install", "-qq", *arguments]
    environ = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        return subprocess.run(
            command, env=environ, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=True
        ).stdout
    except subprocess.TimeoutExpired:
        sys.exit(f"pip was not done after {timeout_s:g} s: pip install {shlex.join(arguments)}")
    except subprocess.CalledProcessError:
        sys.exit(f"pip failed, its message is above: pip install {shlex.join(arguments)}")


def describe_torch(python: Path) -> str:
    """Version and build of the torch that was installed, by importing it."""
    build = "f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'"
    command = [python, "-c", f"import torch; print('torch', torch.__version__, 'built for', {build})"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout.strip()


if __name__ == "__main__":
    main()
