"""Shapes and numbers of charts, in SVG units; the report's template draws them."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

WIDTH, HEIGHT = 330, 150
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 10, 26
"""Margins in SVG units; they hold the numbers of the axes."""
NUM_LABELS = 5
"""Approximate count of numbers on an axis."""
BASE = HEIGHT - BOTTOM
"""The y coordinate of zero."""
GAP = 1.5
"""Space between two bars, in SVG units."""
Number: TypeAlias = int | float


class Bin(NamedTuple):
    """Count of values from `first` up to, but not including, `end`."""

    first: int
    end: int | None
    """None for an open-ended bin."""
    number: int


class Chart(NamedTuple):
    """Histogram, or chart of a value over time."""

    title: str
    grid: list[tuple[float, str]]
    """The y coordinate of each grid line, and its number."""
    below: list[tuple[float, str]]
    """The x coordinate of each number of the horizontal axis, and the number."""
    bars: Sequence[tuple[str, float, float, float]] = ()
    """Title, left edge, upper edge and width of each bar; its lower edge is `BASE`."""
    line: str = ""
    """Points of a line as SVG writes them, such as `42.0,124.0 322.0,10.0`."""


def histogram(bins: Sequence[Bin], *, unit: str, counted: str) -> Chart:
    """Return a histogram with one bar per bin, all equally wide, from left to right.

    Args:
        bins: Adjoining bins of one width, except that the last may be open-ended.
        unit: Unit of the horizontal axis.
        counted: Name of the counted items.
    """
    top = ticks(max(NUM_LABELS, *(b.number for b in bins)))[-1]
    is_exact = bins[0].end == bins[0].first + 1
    step = (WIDTH - LEFT - RIGHT) / len(bins)
    bars = []
    for i, each in enumerate(bins):
        title = f"{_span(each)} {unit}: {each.number:,} {counted}"
        bars.append((title, LEFT + i * step, _y(each.number, top), max(1, step - GAP)))
    below = [
        (LEFT + (i + is_exact / 2) * step, f"{bins[i].first:,}")
        for i in range(0, len(bins), -(-len(bins) // NUM_LABELS))
    ]
    return Chart(f"{counted} by {unit}", _grid(top), below, bars=bars)


def over_time(
    seconds: Sequence[Number], values: Sequence[Number], *, unit: str, top: Number
) -> Chart:
    """Return a chart of a value per time step.

    Args:
        seconds: Bounds of the time steps; one more than there are values.
        values: One value per step.
        unit: Unit of the values.
        top: Lower bound of the upper end of the vertical axis.
    """
    top = ticks(max(top, *values))[-1]
    end = max(seconds[-1], 1e-9)

    def x(secs: Number) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * secs / end

    corners = []
    for i, value in enumerate(values):
        corners += [(x(seconds[i]), _y(value, top)), (x(seconds[i + 1]), _y(value, top))]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    below = [(x(secs), duration(secs)) for secs in ticks(end, whole=True) if secs <= end]
    return Chart(f"{unit} over time", _grid(top), below, line=line)


def ticks(top: Number, *, whole: bool = False) -> list[Number]:
    """Return round numbers from 0, the last of them at least `top`, about `NUM_LABELS` in all.

    Args:
        top: Value that the last number reaches.
        whole: Whether steps are round numbers of seconds, minutes or hours.
    """
    least = max(top, 1e-9) / NUM_LABELS
    if whole:
        sizes = [n * unit for unit in (1, 60, 3600) for n in (1, 2, 5, 10, 20, 30)]
        step: Number = next((s for s in sizes if s >= least), math.ceil(least / 3600) * 3600)
    else:
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9))
    return [i * step for i in range(max(1, math.ceil(top / step - 1e-9)) + 1)]


def amount(value: Number) -> str:
    """Return a number as short text, such as `12k` or `3.5M`."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / size:g}{letter}"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


def duration(secs: Number) -> str:
    """Return seconds as readable text, such as `2 min 5 s`."""
    if secs < 60:
        return f"{secs:g} s"
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _span(each: Bin) -> str:
    """Return the range of a bin as text."""
    if each.end is None:
        return f"{each.first:,} or more"
    return f"{each.first:,}" + (f" to {each.end - 1:,}" if each.end > each.first + 1 else "")


def _grid(top: Number) -> list[tuple[float, str]]:
    return [(_y(value, top), amount(value)) for value in ticks(top)]


def _y(value: Number, top: Number) -> float:
    """Return the SVG y coordinate of a value."""
    return BASE - (BASE - TOP) * value / top
