"""How the demo looks: titles, tables, and colours where the output is a terminal."""

from __future__ import annotations

import os
import sys

BOLD, RED, GREEN = 1, 31, 32
TELLING_WORDS = {"resumed at": GREEN, "identical": GREEN, "published:": GREEN, "DIFFERENT": RED, "NOT THERE": RED}
IS_TERMINAL = sys.stdout.isatty() and "NO_COLOR" not in os.environ


def title(text: str) -> None:
    print(f"\n{paint(text, BOLD)}", flush=True)


def print_table(rows: list[list[str]], *, align: str) -> None:
    """Aligned columns, the first row bold; `align` has an "l" or "r" for each column."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        ]
        line = "  ".join(cells).rstrip()
        print("  " + (paint(line, BOLD) if number == 0 else emphasized(line)))


def emphasized(text: str) -> str:
    """The telling words in colour."""
    for word, colour in TELLING_WORDS.items():
        text = text.replace(word, paint(word, colour))
    return text


def paint(text: str, code: int) -> str:
    return f"\033[{code}m{text}\033[0m" if IS_TERMINAL else text
