"""What the package offers is what its `__all__` says, is documented, and the errors' tree is drawn as it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import stillframe
from stillframe import errors

PACKAGE_DIR = Path(stillframe.__file__).parent
OFFERING_PACKAGES = ["stillframe", "stillframe.testing"]


def package_path(name: str) -> Path:
    return PACKAGE_DIR.joinpath(*name.split(".")[1:], "__init__.py")


def names_imported_to_be_offered(path: Path) -> set[str]:
    """What an `__init__` imports from the package, also where only type checkers look."""
    return {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("stillframe")
        for alias in node.names
    }


@pytest.mark.parametrize("name", OFFERING_PACKAGES)
def test_all_is_what_the_package_offers(name: str) -> None:
    offered = list(importlib.import_module(name).__all__)
    assert offered == sorted(set(offered))
    assert set(offered) - {"__version__"} == names_imported_to_be_offered(package_path(name))


def test_no_other_package_offers_names_of_its_own() -> None:
    others = {path: names_imported_to_be_offered(path) for path in PACKAGE_DIR.rglob("__init__.py")}
    for name in OFFERING_PACKAGES:
        del others[package_path(name)]
    assert {path: names for path, names in others.items() if names} == {}


@pytest.mark.parametrize("package", OFFERING_PACKAGES)
def test_what_is_offered_exists_and_is_documented(package: str) -> None:
    module = importlib.import_module(package)
    undocumented = []
    for name in set(module.__all__) - {"__version__"}:
        offered = getattr(module, name)
        parts = {name: offered}
        if inspect.isclass(offered):
            parts |= {f"{name}.{key}": part for key, part in vars(offered).items() if is_public_part(key, part)}
        undocumented += [key for key, part in parts.items() if not inspect.getdoc(part)]
    assert undocumented == []


def is_public_part(name: str, part: object) -> bool:
    return not name.startswith("_") and (inspect.isfunction(part) or isinstance(part, property))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Checkpointr'"):
        getattr(stillframe, "Checkpointr")  # noqa: B009


def test_every_module_says_what_it_is() -> None:
    paths = sorted(PACKAGE_DIR.rglob("*.py"))
    assert len(paths) > 20
    assert [path for path in paths if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    classes = {
        name: part
        for name, part in vars(errors).items()
        if inspect.isclass(part) and issubclass(part, Exception) and part.__module__ == errors.__name__
    }
    parents = {name: part.__bases__[0].__name__ for name, part in classes.items() if part is not errors.StillframeError}
    assert len(parents) > 10
    assert drawn_parents(str(errors.__doc__)) == parents


def drawn_parents(text: str) -> dict[str, str]:
    """Child to parent, from a tree in box-drawing characters, 4 columns to the level."""
    parents = {}
    path: list[str] = []
    for line in text.splitlines():
        match = re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        path[depth:] = [match[2]]
        if depth:
            parents[match[2]] = path[depth - 1]
    return parents
