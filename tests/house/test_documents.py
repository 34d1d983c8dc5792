"""What the documents say can be done, can be; and what can be done is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT_DIR = Path(__file__).parents[2]
NOT_OURS = {".git", ".hypothesis", ".venv", "__pycache__", "build", "dist", "runs"}


def files_of_the_project() -> Iterator[Path]:
    for folder, folders, names in os.walk(ROOT_DIR):
        folders[:] = [name for name in folders if name not in NOT_OURS and not name.endswith(("_cache", ".egg-info"))]
        yield from (Path(folder) / name for name in names if name != ".git")  # a file, in a work tree of git


def shell_blocks(text: str) -> list[list[str]]:
    """The lines of each fenced block of shell commands, without comments and prompts."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in fenced if language in ("", "bash", "sh", "shell", "console")]
    lines = [[line.partition(" #")[0].removeprefix("$ ").strip() for line in block.splitlines()] for block in blocks]
    return [[line for line in block if line and not line.startswith("#")] for block in lines]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT_DIR / "Makefile").read_text(), re.MULTILINE))


def cli_commands() -> set[str]:
    """The commands that `stillframe --help` lists."""
    finished = subprocess.run(
        [sys.executable, "-m", "stillframe", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    commands = set(re.findall(r"^    ([a-z][a-z-]*)(?:\s|$)", finished.stdout, re.MULTILINE))
    assert commands, finished.stdout
    return commands


def test_every_command_is_documented() -> None:
    documents = [ROOT_DIR / "README.md", *(ROOT_DIR / "docs").rglob("*.md")]
    text = "\n".join(path.read_text() for path in documents)
    undocumented = {name for name in cli_commands() if not re.search(rf"\bstillframe {re.escape(name)}\b", text)}
    assert undocumented == set()


def test_the_readme_opens_with_the_two_commands_that_set_everything_up() -> None:
    first, *_ = shell_blocks((ROOT_DIR / "README.md").read_text())
    assert first[:2] == ["make demo", "make test"]


def test_the_readme_names_only_commands_that_exist() -> None:
    lines = [line for block in shell_blocks((ROOT_DIR / "README.md").read_text()) for line in block]
    targets = {match[1] for line in lines if (match := re.match(r"make ([a-z-]+)", line))}
    commands = {match[1] for line in lines if (match := re.search(r"\bstillframe ([a-z-]+)", line))}
    assert targets <= make_targets()
    assert commands <= cli_commands()


def test_every_make_target_is_documented() -> None:
    text = (ROOT_DIR / "CONTRIBUTING.md").read_text()
    targets = make_targets()
    assert {"demo", "test", "check"} <= targets
    assert {target for target in targets if f"`make {target}`" not in text} == set()


def test_every_link_between_documents_leads_somewhere() -> None:
    broken = []
    for path in files_of_the_project():
        if path.suffix == ".md":
            for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text()):
                target = path.parent / file if file else path
                if not target.exists() or (anchor and anchor not in anchors_of(target)):
                    broken.append(f"{path.relative_to(ROOT_DIR)}: {file}#{anchor}")
    assert broken == []


def anchors_of(document: Path) -> set[str]:
    """What links can name in it, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    machine_path = re.compile(rb"(?<![\w.-])/([w]ork|[r]oot|home/\w+|tmp/[v]env|Users/\w+)/")
    registry = re.compile(rb"[p]ypi\.org|[f]iles\.pythonhosted\.org|[d]ownload\.pytorch\.org|/[o]pt/(wheels|pypi)")
    found = []
    for path in files_of_the_project():
        content = path.read_bytes()
        found += [f"{path.relative_to(ROOT_DIR)}: {match[0].decode()}" for match in machine_path.finditer(content)]
        found += [f"{path.relative_to(ROOT_DIR)}: {match[0].decode()}" for match in registry.finditer(content)]
    assert found == []
