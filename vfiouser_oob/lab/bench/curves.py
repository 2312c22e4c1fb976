"""The curves of `bench --scale` as one SVG: a small picture for each figure, a line for each spread.

A plotting library is a thousand times as large as these lines, and its pictures differ between its versions. These
write the same bytes for the same figures, so a test can hold that a committed picture shows the committed figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from vfiouser_oob.lab.bench.scale_figures import ScaleFigures, by_spread

#: Pixels: a picture with its margins, the margins, and what is above all of them.
_WIDTH, _HEIGHT = 300, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 28, 34
_HEAD = 30
_COLUMNS = 3
#: Visible on white and on black; the second line is dashed as well, for who cannot tell the colours.
_STROKES = ('stroke="#2f81f7"', 'stroke="#d9730d" stroke-dasharray="5 3"')
_FILLS = ("#2f81f7", "#d9730d")
_GREY = "#808890"
_FONT = 'font-family="sans-serif" font-size="12"'


@dataclass(frozen=True, slots=True)
class Picture:
    """What one picture shows.

    Args:
        title: what it is, with its unit.
        figure: its name in `ScaleFigures`.
        logarithmic: whether each step upwards is ten times as much.
        budget: a line that should not be crossed.
    """

    title: str
    figure: str
    logarithmic: bool = True
    budget: float | None = None


PICTURES = (
    Picture("memory, MB", "memory_mb"),
    Picture("idle wake-ups per second", "idle_wake_ups", logarithmic=False),
    Picture("start of all functions, s", "start_s"),
    Picture("all attach at once: p99, ms", "storm_p99_ms", budget=500),
    Picture("all save at once, MB/s", "migration_mb_s", logarithmic=False),
    Picture("a bystander's read meanwhile: p99, ms", "read_p99_ms", budget=20),
)


class _Scale:
    """Where a value is in a picture.

    Args:
        values: everything that has to be seen.
        logarithmic: see `Picture`.
    """

    def __init__(self, values: Sequence[float], logarithmic: bool) -> None:
        self._logarithmic = logarithmic
        top = max(*values, 1e-3)
        if logarithmic:
            low = math.floor(math.log10(max(min(values), 1e-3)))
            self._low, self._high = float(low), float(max(low + 1, math.ceil(math.log10(top))))
            self.ticks = [10.0**power for power in range(int(self._low), int(self._high) + 1)]
        else:
            unit = 10.0 ** math.floor(math.log10(top))
            step = next(unit * factor for factor in (0.2, 0.5, 1, 2) if top <= 5 * unit * factor)
            self._low, self._high = 0.0, step * math.ceil(top / step)
            self.ticks = [step * number for number in range(round(self._high / step) + 1)]

    def y(self, value: float) -> float:
        """Pixels from the upper edge of the picture."""
        place = math.log10(max(value, 10.0**self._low)) if self._logarithmic else value
        return _HEIGHT - _BOTTOM - (place - self._low) / (self._high - self._low) * (_HEIGHT - _TOP - _BOTTOM)


def _x(sizes: Sequence[int], size: int) -> float:
    """Pixels from the left edge of a picture; each step to the right is twice as many functions."""
    first, last = math.log2(sizes[0]), math.log2(sizes[-1])
    share = (math.log2(size) - first) / (last - first) if last > first else 0.5
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", weight: str = "normal", fill: str = _GREY) -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _line(left: float, top: float, right: float, bottom: float, style: str) -> str:
    return f'<line x1="{left:.1f}" y1="{top:.1f}" x2="{right:.1f}" y2="{bottom:.1f}" {style}/>'


def _picture(picture: Picture, figures: Sequence[ScaleFigures]) -> Iterator[str]:
    sizes = sorted({each.functions for each in figures})
    values = [float(getattr(each, picture.figure)) for each in figures]
    scale = _Scale(values if picture.budget is None else [*values, picture.budget], picture.logarithmic)
    yield _text(_LEFT, 16, picture.title, anchor="start", weight="bold")
    for tick in scale.ticks:
        yield _line(_LEFT, scale.y(tick), _WIDTH - _RIGHT, scale.y(tick), f'stroke="{_GREY}" stroke-opacity="0.3"')
        yield _text(_LEFT - 6, scale.y(tick) + 4, f"{tick:g}", anchor="end")
    for size in sizes:
        yield _text(_x(sizes, size), _HEIGHT - _BOTTOM + 16, f"{size}")
    if picture.budget is not None:
        height = scale.y(picture.budget)
        yield _line(_LEFT, height, _WIDTH - _RIGHT, height, 'stroke="#cf222e" stroke-dasharray="2 3"')
        yield _text(_WIDTH - _RIGHT, height - 4, f"budget {picture.budget:g}", anchor="end", fill="#cf222e")
    for found, stroke, fill in zip(by_spread(figures).values(), _STROKES, _FILLS, strict=True):
        points = [(_x(sizes, each.functions), scale.y(getattr(each, picture.figure))) for each in found]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke-width="2" {stroke}/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}"/>' for x, y in points)


def scale_svg(figures: Sequence[ScaleFigures]) -> str:
    """Draw the curves.

    Args:
        figures: of both spreads.

    Returns:
        An SVG document.
    """
    width, height = _COLUMNS * _WIDTH, _HEAD + -(-len(PICTURES) // _COLUMNS) * _HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" {_FONT}>',
        "<title>What 1 to many functions cost, in one daemon and in a process each</title>",
    ]
    for number, (spread, stroke) in enumerate(zip(by_spread(figures), _STROKES, strict=True)):
        left = _LEFT + 170 * number
        lines += [
            _line(left, 16, left + 28, 16, f'stroke-width="2" {stroke}'),
            _text(left + 34, 20, spread, anchor="start"),
        ]
    lines.append(_text(width - _RIGHT, 20, "across: functions", anchor="end"))
    for number, picture in enumerate(PICTURES):
        left, top = number % _COLUMNS * _WIDTH, _HEAD + number // _COLUMNS * _HEIGHT
        lines += [f'<g transform="translate({left} {top})">', *_picture(picture, figures), "</g>"]
    return "\n".join([*lines, "</svg>", ""])
