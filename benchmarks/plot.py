"""A plot of a few lines as SVG: enough for figures by powers of two, without a library for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 150, 40, 50
_COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e5ea2", "#b8860b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    name: str
    points: tuple[tuple[float, float], ...]


def line_plot(lines: Sequence[Line], *, title: str, x: str, y: str) -> str:
    """The lines over a logarithmic x axis, ticked where there are points, and a y axis that begins at 0."""
    ticks = sorted({at for line in lines for at, _ in line.points})
    top = max(value for line in lines for _, value in line.points)
    power = 10 ** math.floor(math.log10(top))
    step = next(s for s in (power / 5, power / 2, power, power * 2) if top / s <= 6)
    top = math.ceil(top / step) * step

    def across(at: float) -> float:
        spread = math.log(ticks[-1] / ticks[0]) or 1.0
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(at / ticks[0]) / spread

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / top

    def text(left: float, middle: float, words: str, anchor: str, colour: str = "#333") -> str:
        return f'<text x="{left:.1f}" y="{middle:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'

    def stroke(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
        path = " ".join(f"{left:.1f},{middle:.1f}" for left, middle in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    drawn = [text(_LEFT, _TOP - 18, title, "start")]
    for mark in range(round(top / step) + 1):
        value = mark * step
        drawn.append(stroke([(_LEFT, up(value)), (_WIDTH - _RIGHT, up(value))], "#ddd", 1))
        drawn.append(text(_LEFT - 8, up(value) + 4, f"{value:g}", "end"))
    drawn += [text(across(at), up(0) + 20, f"{at:,g}" if at < 1e6 else f"{at:.0e}", "middle") for at in ticks]
    drawn.append(text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x, "middle"))
    drawn.append(text(12, _TOP - 2, y, "start"))
    # Names stand at the ends of their lines, pushed apart where those are close.
    free = float(_HEIGHT)
    for line, colour in sorted(
        zip(lines, _COLOURS, strict=False), key=lambda pair: up(pair[0].points[-1][1]), reverse=True
    ):
        places = [(across(at), up(value)) for at, value in line.points]
        drawn.append(stroke(places, colour, 2))
        drawn += [f'<circle cx="{left:.1f}" cy="{middle:.1f}" r="3" fill="{colour}"/>' for left, middle in places]
        free = min(free - 16, places[-1][1] + 4)
        drawn.append(text(places[-1][0] + 10, free, line.name, "start", colour))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
    )
    background = f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    return "\n".join([head, background, *drawn, "</svg>", ""])
