"""Imports go one way: from what users hold, through the stages of a save, down to records, options and errors.

A name stands for `stillframe/<name>.py` or the package `stillframe/<name>/`. It may import what stands on a lower
level. Names on one level do not import each other; what is needed all the same is in `EXCEPTIONS`, with its reason.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE_DIR = Path(__file__).parents[2] / "src"
PACKAGE_DIR = SOURCE_DIR / "stillframe"

STAGES = {"state", "layout", "snapshot", "writer", "commit", "catalog", "load", "watch"}
LEVELS = (
    {"errors", "sketch"},
    {"fields", "names", "records"},
    {
        "durable",
        "limits",
        "manifest",
        "notice",
        "patches",
        "policies",
        "provenance",
        "receipts",
        "ties",
        "tree",
        "wrappers",
    },
    {"options"},
    STAGES,
    {"save", "staged", "start"},
    {"export", "resumable"},
    {"frames", "resume"},
    {"background"},
    {"checkpointer"},
    {"preemption"},
    {"train"},
    {"cli"},
    {"__main__", "testing"},
)
EXCEPTIONS = {
    ("load", "layout"): "loading is the layout read backwards",
    ("load", "commit"): "ranks that load together tell each other how it goes",
}
# Of the package itself, what those below the Checkpointer may use: its version, and ("") where it lies on disk.
FOR_EVERYBODY = {"__version__", ""}


class Import(NamedTuple):
    importer: str
    imported: str
    place: str


def names_of_package() -> set[str]:
    modules = {path.stem for path in PACKAGE_DIR.glob("*.py")} - {"__init__"}
    return modules | {path.parent.name for path in PACKAGE_DIR.glob("*/__init__.py")}


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def imports_inside_the_package() -> list[Import]:
    found = []
    for path in sorted(PACKAGE_DIR.rglob("*.py")):
        parts = path.relative_to(PACKAGE_DIR).with_suffix("").parts
        for line, module in imported_modules(path):
            head, _, rest = module.partition(".")
            imported = rest.partition(".")[0]
            if head == "stillframe" and parts[0] not in (imported, "__init__"):
                found.append(Import(parts[0], imported, f"{path.relative_to(SOURCE_DIR)}:{line}"))
    return found


def level(name: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if name in names)


def test_every_module_has_its_level() -> None:
    placed = [name for names in LEVELS for name in names]
    assert sorted(placed) == sorted(names_of_package())


def test_imports_go_down() -> None:
    found = imports_inside_the_package()
    assert len(found) > 20
    users_of_the_package = {name for names in LEVELS[level("checkpointer") + 1 :] for name in names}
    wrong = []
    for importer, imported, place in found:
        if imported not in names_of_package():  # something that `stillframe/__init__.py` itself offers
            allowed = imported in FOR_EVERYBODY or importer in users_of_the_package
        else:
            allowed = level(imported) < level(importer) or (importer, imported) in EXCEPTIONS
        if not allowed:
            wrong.append(f"{place}: {importer} imports {imported}")
    assert wrong == []


def test_no_exception_is_stale() -> None:
    assert EXCEPTIONS.keys() <= {(found.importer, found.imported) for found in imports_inside_the_package()}


@pytest.mark.parametrize("path", sorted((PACKAGE_DIR / "writer").glob("*.py")), ids=lambda path: path.stem)
def test_the_writer_is_free_of_torch(path: Path) -> None:
    module = "stillframe.writer" if path.stem == "__init__" else f"stillframe.writer.{path.stem}"
    program = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'safetensors'}} & sys.modules.keys()))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (finished.stdout, finished.stderr) == ("[]\n", "")
