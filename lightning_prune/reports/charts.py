"""Charts for a page without JavaScript: inline SVG that fits any width, with its labels beside it in HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_FLOOR = 1e-12
"""The least value that a logarithmic axis shows; zero is drawn there."""

_COLOURS = 5


class Series(NamedTuple):
    """One line of a chart.

    Args:
        name: in the legend.
        points: x, y and what a pointer that rests there reads; in the order of x.
    """

    name: str
    points: Sequence[tuple[float, float, str]]


class Axis(NamedTuple):
    """One direction of a chart.

    Args:
        low: value at the beginning.
        high: value at the end.
        ticks: value and label of each mark.
        log: whether decades are equally long.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Position of a value in per cent of the length.

        >>> Axis(0, 4, ()).place(1), Axis(0.01, 1, (), log=True).place(0.1)
        (25.0, 50.0)
        """
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.log else value
        return round(100 * (at - low) / (high - low), 3)


def linear(values: Sequence[float], wanted: int = 4) -> Axis:
    """An axis over all values, marked at round numbers.

    >>> linear([0.12, 0.98]).ticks
    ((0.0, '0'), (0.5, '0.5'), (1.0, '1'))
    """
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if last - first > wanted:
        step, first, last = 2.5 * step, math.floor(low / step / 2.5 + 1e-9), math.ceil(high / step / 2.5 - 1e-9)
    ticks = tuple((number * step, f"{number * step:.4g}") for number in range(first, last + 1))
    return Axis(ticks[0][0], ticks[-1][0], ticks)


def logarithmic(values: Sequence[float]) -> Axis:
    """An axis of whole decades over all positive values; zero lies at its beginning.

    >>> [label for _, label in logarithmic([1.0, 0.03, 0.0]).ticks]
    ['0.001', '0.01', '0.1', '1']
    """
    positive = [value for value in values if value >= _FLOOR] or [1.0]
    first, last = math.floor(math.log10(min(positive)) + 1e-9), math.ceil(math.log10(max(positive)) - 1e-9)
    if first == last or min(values) < _FLOOR:
        first -= 1
    every = math.ceil((last - first) / 4)
    first = last - every * math.ceil((last - first) / every)  # the lowest mark is the beginning
    decades = range(last, first - 1, -every)
    ticks = tuple((10.0**decade, _power(decade)) for decade in reversed(decades))
    return Axis(10.0**first, 10.0**last, ticks, log=True)


def _power(decade: int) -> str:
    return f"{10.0**decade:g}" if -4 <= decade <= 4 else f"1e{decade}"


def epochs(low: float, high: float) -> Axis:
    """An axis of whole epochs, marked where there is room for a label.

    >>> epochs(0, 12).ticks
    ((0, '0'), (2, '2'), (4, '4'), (6, '6'), (8, '8'), (10, '10'), (12, '12'))
    """
    step = next(each * 10**power for power in range(9) for each in (1, 2, 5) if each * 10**power * 8 >= high - low)
    first = math.ceil(low / step)
    ticks = tuple((number * step, str(number * step)) for number in range(first, math.floor(high / step) + 1))
    return Axis(low, max(high, low + 1), ticks)


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis, mark: tuple[float, str] | None = None) -> str:
    """One figure: a line per series over epochs.

    Args:
        title: what y is, with its unit.
        series: at most five have colours of their own.
        x: of epochs.
        y: of values.
        mark: an epoch with a line of its own, and what it is.
    """
    lines = [f'<line class="grid" x1="0" x2="100" y1="{_up(y, tick)}" y2="{_up(y, tick)}"/>' for tick, _ in y.ticks]
    marked = ""
    if mark is not None and x.low <= mark[0] <= x.high:
        at = x.place(mark[0])
        lines.append(f'<line class="mark" x1="{at}" x2="{at}" y1="0" y2="100"/>')
        side = "right" if at > 70 else "left"
        offset = 100 - at if side == "right" else at
        marked = f'<span class="marked" style="{side}:{offset:.2f}%">{escape(mark[1])}</span>'
    for number, (_, points) in enumerate(series):
        path = " ".join(f"{x.place(at)},{_up(y, value)}" for at, value, _ in points)
        lines.append(f'<polyline class="s{number % _COLOURS}" points="{path}"/>')
        for at, value, words in points:
            dot = f"M{x.place(at)} {_up(y, value)}h0"
            lines.append(f'<path class="dot s{number % _COLOURS}" d="{dot}"><title>{escape(words)}</title></path>')
    across = "".join(f'<span style="left:{x.place(tick):.2f}%">{escape(label)}</span>' for tick, label in x.ticks)
    along = "".join(f'<span style="top:{_up(y, tick):.2f}%">{escape(label)}</span>' for tick, label in y.ticks)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{_legend(series)}</figcaption><div class="plot">'
        f'<div class="y">{along}</div><div class="area">{marked}'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f'{"".join(lines)}</svg></div><div class="x">{across}</div></div></figure>'
    )


def bar(before: float, after: float, largest: float) -> str:
    """One row's bar: what was there, and over it what is left."""
    old, new = (round(100 * value / max(largest, 1), 2) for value in (before, after))
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="old" width="{old}" height="10"/><rect class="new" width="{new}" height="10"/></svg>'
    )


def _up(axis: Axis, value: float) -> float:
    return round(100 - axis.place(value), 3)


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    keys = (f'<span class="key s{number % _COLOURS}">{escape(each.name)}</span>' for number, each in enumerate(series))
    return f'<span class="legend">{"".join(keys)}</span>'
