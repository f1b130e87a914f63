"""Charts as SVG and HTML text, styled by the page alone, without scripts or network access."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

WIDTH, HEIGHT = 330, 150
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 10, 26
"""Margins in SVG units; they hold the numbers of the axes."""
NUM_LABELS = 5
"""Approximate count of numbers on an axis."""
GAP = 1.5
"""Space between two bars, in SVG units."""
Number: TypeAlias = int | float


class Bin(NamedTuple):
    """Count of values from `first` up to, but not including, `end`."""

    first: int
    end: int | None
    """None for an open-ended bin."""
    number: int


def histogram(bins: Sequence[Bin], *, unit: str, counted: str) -> str:
    """Return an SVG histogram with one bar per bin, all equally wide, from left to right.

    Args:
        bins: Adjoining bins of one width, except that the last may be open-ended.
        unit: Unit of the horizontal axis.
        counted: Name of the counted items.
    """
    top = ticks(max(NUM_LABELS, *(b.number for b in bins)))[-1]
    is_exact = bins[0].end == bins[0].first + 1
    step = (WIDTH - LEFT - RIGHT) / len(bins)
    parts = [_grid(top, amount)]
    for i, each in enumerate(bins):
        x, y = LEFT + i * step, _y(each.number, top)
        parts.append(
            f"<g><title>{_span(each)} {unit}: {each.number:,} {counted}</title>"
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{max(1, step - GAP):.1f}" '
            f'height="{_y(0, top) - y:.1f}"/></g>'
        )
    parts += [
        _below(LEFT + (i + is_exact / 2) * step, f"{bins[i].first:,}")
        for i in range(0, len(bins), -(-len(bins) // NUM_LABELS))
    ]
    return _svg(parts, f"{counted} by {unit}")


def over_time(
    seconds: Sequence[Number], values: Sequence[Number], *, unit: str, top: Number
) -> str:
    """Return an SVG area chart of a value per time step.

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
    base = f"{_y(0, top):.1f}"
    parts = [
        _grid(top, amount),
        f'<polygon class="area" points="{x(0):.1f},{base} {line} {x(end):.1f},{base}"/>',
        f'<polyline class="line" points="{line}"/>',
    ]
    parts += [_below(x(secs), duration(secs)) for secs in ticks(end, whole=True) if secs <= end]
    return _svg(parts, f"{unit} over time")


def bars(items: Iterable[tuple[str, int]], total: int, *, kind: str = "") -> str:
    """Return an HTML table of names, with a bar, a count and a percentage of the total each.

    Args:
        items: Pairs of name and count.
        total: Count that a full bar stands for.
        kind: Additional CSS class of the table.
    """
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        f'<td class="share"><i style="width:{100 * count / max(1, total):.2f}%"></i></td>'
        f'<td class="number">{count:,}</td>'
        f'<td class="number">{100 * count / max(1, total):.1f} %</td></tr>'
        for name, count in items
    )
    return f'<table class="bars {kind}">{rows}</table>'


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


def _grid(top: Number, text: Callable[[Number], str]) -> str:
    """Return the horizontal grid lines, each labeled with its number."""
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(v, top):.1f}" '
        f'y2="{_y(v, top):.1f}"/><text x="{LEFT - 6}" y="{_y(v, top) + 3.5:.1f}" '
        f'text-anchor="end">{text(v)}</text>'
        for v in ticks(top)
    )


def _below(x: Number, text: str) -> str:
    """Return a label of the horizontal axis."""
    return f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{text}</text>'


def _y(value: Number, top: Number) -> float:
    """Return the SVG y coordinate of a value."""
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top


def _svg(parts: Iterable[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
