"""What is imported is declared, what is declared is pinned, and a machine without a GPU is spared the CUDA build."""

from __future__ import annotations

import re
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from dev.set_up import needs_cuda
from tests.house.test_imports import PACKAGE_DIR, imported_modules

ROOT_DIR = Path(__file__).parents[2]
DISTRIBUTIONS = {"PIL": "pillow"}
"""Where the name of the import is not that of the distribution."""


def declared() -> tuple[set[str], set[str]]:
    """The names of what the package needs, and of what developing it needs."""
    project = tomllib.loads((ROOT_DIR / "pyproject.toml").read_text())["project"]
    return _names(project["dependencies"]), _names(project["optional-dependencies"]["dev"])


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in requirements}


def third_parties(folder: Path) -> set[str]:
    heads = {module.partition(".")[0] for path in folder.rglob("*.py") for _, module in imported_modules(path)}
    ours = {"stillframe", "tests", "dev", "benchmarks", *(path.stem for path in folder.glob("*.py"))}
    return {DISTRIBUTIONS.get(head, head) for head in heads - sys.stdlib_module_names - ours}


def test_the_package_imports_only_what_it_declares() -> None:
    needed, _ = declared()
    found = {name for name in third_parties(PACKAGE_DIR) if name != "pillow"}  # only an optional part of Transformers
    assert "torch" in found
    assert found <= needed


@pytest.mark.parametrize("folder", ["tests", "examples/demo", "benchmarks"])
def test_tests_and_examples_import_only_what_is_declared(folder: str) -> None:
    needed, for_development = declared()
    assert third_parties(ROOT_DIR / folder) <= needed | for_development


def test_everything_declared_is_pinned() -> None:
    needed, for_development = declared()
    lines = (ROOT_DIR / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line)}
    assert needed | for_development <= pinned
    assert [line for line in lines if not line.startswith("#") and line.partition("==")[0].lower() not in pinned] == []


@pytest.mark.parametrize(("dependency", "is_cuda_build"), [("nvidia-cublas==13.*", True), ("sympy", False)])
def test_which_build_of_torch_would_be_installed_is_known_before(
    dependency: str, is_cuda_build: bool, tmp_path: Path
) -> None:
    wheel_path = tmp_path / "torch-1.99-py3-none-any.whl"
    with zipfile.ZipFile(wheel_path, "w") as wheel:
        info = "torch-1.99.dist-info"
        metadata = ["Metadata-Version: 2.1", "Name: torch", "Version: 1.99", f"Requires-Dist: {dependency}"]
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    pip_args = ["--isolated", "--no-index", f"--find-links={tmp_path}"]
    assert needs_cuda(Path(sys.executable), "torch==1.99", pip_args) is is_cuda_build
