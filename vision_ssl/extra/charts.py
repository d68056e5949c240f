"""Charts as inline SVG, whose colours follow the page's. Series differ by dashes or marks too, not by colour alone."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .html import Child, Markup, figure, tag

# A chart is this wide in its own units, which on a phone are about pixels: so its text stays legible there.
WIDTH, HEIGHT = 340, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 10, 38
_POINTS = 300  # a line has no more, which is what a screen can show
_DASHES = (None, "6 3", "2 3", "8 3 2 3")
# Marks in a square from -3 to 3, each as a closed path.
_MARKS = (
    "m-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0z",
    "m-3 2.5h6l-3-5.5z",
    "m-2.3-2.3h4.6v4.6h-4.6z",
    "m0-3.4l3 3.4l-3 3.4l-3-3.4z",
)
_COLOURS = 8

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: Its name in the key; "" keeps it out of there.
        x: (n,).
        y: (n,).
        series: Its colour and dashes.
        faint: Thin, behind the others.
    """

    label: str
    x: Numbers
    y: Numbers
    series: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Group:
    """Points of a map.

    Attributes:
        label: Their name in the key.
        points: (n, 2).
        series: Their colour and mark; None for gray points in the background.
    """

    label: str
    points: Numbers
    series: int | None


def line_chart(title: str, lines: Sequence[Line], *, x_label: str, y_label: str, from_zero: bool = False) -> Markup:
    """Draw lines over a common axis.

    Args:
        title: What it shows, for those who do not see it.
        lines: At least one, each with a point.
        x_label: With the unit.
        y_label: Likewise.
        from_zero: Begin the vertical axis at 0.
    """
    x_ticks, y_ticks = (
        ticks(min(values.min() for values in column), max(values.max() for values in column))
        for column in ([line.x for line in lines], [*(line.y for line in lines), *([np.zeros(1)] if from_zero else [])])
    )
    across, up = _Scale(x_ticks, _LEFT, WIDTH - _RIGHT), _Scale(y_ticks, HEIGHT - _BOTTOM, _TOP)
    drawn = [
        tag(
            "path",
            class_="line faint" if line.faint else "line",
            d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(across(line.x), up(line.y), strict=True)),
            stroke=colour(line.series),
            stroke_dasharray=None if line.faint else _DASHES[line.series % len(_DASHES)],
        )
        for line in map(_thinned, sorted(lines, key=lambda line: not line.faint))
    ]
    dots = [
        tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.5, fill=colour(line.series))
        for line in lines
        if len(line.x) <= 30
        for x, y in zip(across(line.x), up(line.y), strict=True)
    ]
    chart = _svg(title, HEIGHT, [_axes(x_ticks, y_ticks, x_label, y_label), *drawn, *dots])
    named = [line for line in lines if line.label]
    swatches = (
        tag(
            "path",
            class_="line",
            d="M0 5H26",
            stroke=colour(line.series),
            stroke_dasharray=_DASHES[line.series % len(_DASHES)],
        )
        for line in named
    )
    return Markup(chart + (_key([line.label for line in named], swatches) if len(named) > 1 else ""))


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float]], unit: str) -> Markup:
    """Draw values with their intervals, one below the other.

    Args:
        title: What it shows, for those who do not see it; it also stands above.
        rows: Name, value, low end, high end.
        unit: Written below.
    """
    step, top = 38, 26
    bottom = top + step * len(rows)
    marks = ticks(0.0, max(high for *_, high in rows))
    across = _Scale(marks, 2, WIDTH - 36)
    drawn: list[Child] = [tag("text", title, x=0, y=11, class_="name")]
    for mark in marks:
        x = f"{across(mark):.1f}"
        drawn.append(tag("line", class_="grid", x1=x, x2=x, y1=top, y2=bottom))
        drawn.append(tag("text", f"{mark:g}", x=x, y=bottom + 15, text_anchor="middle" if mark else "start"))
    for row, (name, value, low, high) in enumerate(rows):
        y = top + step * row + 27
        left, centre, right = (f"{across(number):.1f}" for number in (low, value, high))
        drawn += [
            tag("text", name, x=6, y=y - 11, class_="name"),
            tag("path", class_="line", d=f"M{left} {y}H{right}M{left} {y - 4}v8M{right} {y - 4}v8", stroke=colour(row)),
            tag("circle", cx=centre, cy=y, r=4, fill=colour(row)),
            tag("text", f"{value:.1f}", x=float(right) + 7, y=y + 4, class_="value"),
        ]
    drawn.append(tag("text", unit, x=0, y=bottom + 32))
    spoken = "; ".join(f"{name} {value:.1f} ({low:.1f} to {high:.1f})" for name, value, low, high in rows)
    return _svg(f"{title}: {spoken}", bottom + 38, drawn)


def scatter(title: str, groups: Sequence[Group], *, x_label: str, y_label: str) -> Markup:
    """Draw points in two dimensions, on equal scales.

    Args:
        title: What it shows, for those who do not see it.
        groups: Those in the background first.
        x_label: Below.
        y_label: On the left.
    """
    points = np.concatenate([group.points for group in groups])
    low, high = points.min(axis=0), points.max(axis=0)
    room = WIDTH - 24
    scale = room / max(*(high - low), 1e-12)
    height = 12 + scale * (high - low)[1] + 26
    drawn: list[Child] = []
    for group in groups:
        at = (group.points - low) * scale
        mark = _MARKS[0 if group.series is None else group.series % len(_MARKS)]
        d = "".join(f"M{18 + x:.1f} {height - 26 - y:.1f}{mark}" for x, y in at)
        drawn.append(
            tag(
                "path",
                d=d,
                fill=colour(7 if group.series is None else group.series),
                class_="other" if group.series is None else None,
            )
        )
    drawn.append(tag("text", f"{x_label} →", x=18, y=f"{height - 4:.1f}"))
    drawn.append(tag("text", f"{y_label} →", transform=f"translate(9 {height - 26:.1f}) rotate(-90)"))
    swatches = (
        tag("path", d=f"M13 5{_MARKS[group.series % len(_MARKS)]}", fill=colour(group.series))
        for group in groups
        if group.series is not None
    )
    key = _key([group.label for group in groups if group.series is not None], swatches)
    return Markup(tag("div", _svg(title, height, drawn), class_="map") + key)


def panels(charts: Iterable[Markup], caption: Child) -> Markup:
    """Charts beside each other, or below each other on a phone."""
    return figure(tag("div", (tag("div", chart) for chart in charts), class_="panels"), caption)


def colour(series: int) -> str:
    """The colour of a series, as the page defines it."""
    return f"var(--c{series % _COLOURS})"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, about four steps of 1, 2 or 5 times a power of ten, from at most `low` to at least `high`."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [
        round(number * step, 12) for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    ]


class _Scale:
    """Numbers to positions: the first tick lies at `start`, the last at `end`."""

    def __init__(self, marks: Sequence[float], start: float, end: float) -> None:
        self.first, self.start = marks[0], start
        self.slope = (end - start) / (marks[-1] - marks[0])

    def __call__(self, value: Numbers | float) -> Numbers:
        return np.asarray(self.start + self.slope * (np.asarray(value, dtype=np.float64) - self.first))


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> list[Child]:
    across, up = _Scale(x_ticks, _LEFT, WIDTH - _RIGHT), _Scale(y_ticks, HEIGHT - _BOTTOM, _TOP)
    drawn: list[Child] = []
    for mark in y_ticks:
        y = float(up(mark))
        drawn.append(tag("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}"))
        drawn.append(tag("text", f"{mark:g}", x=_LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    for mark in x_ticks:
        drawn.append(
            tag("text", f"{mark:,g}", x=f"{float(across(mark)):.1f}", y=HEIGHT - _BOTTOM + 16, text_anchor="middle")
        )
    drawn.append(tag("text", x_label, x=(WIDTH + _LEFT) / 2, y=HEIGHT - 4, text_anchor="middle"))
    drawn.append(
        tag(
            "text", y_label, transform=f"translate(9 {(HEIGHT - _BOTTOM + _TOP) / 2}) rotate(-90)", text_anchor="middle"
        )
    )
    return drawn


def _thinned(line: Line) -> Line:
    """The line with at most `_POINTS` points, the first and the last among them."""
    if len(line.x) <= _POINTS:
        return line
    chosen = np.linspace(0, len(line.x) - 1, _POINTS).round().astype(np.int64)
    return Line(line.label, line.x[chosen], line.y[chosen], line.series, line.faint)


def _svg(title: str, height: float, content: Child) -> Markup:
    return tag("svg", content, role="img", aria_label=title, viewBox=f"0 0 {WIDTH} {height:.0f}")


def _key(labels: Sequence[str], swatches: Iterable[Markup]) -> Markup:
    items = (
        tag("li", tag("svg", swatch, viewBox="0 0 26 10", aria_hidden="true"), label)
        for label, swatch in zip(labels, swatches, strict=True)
    )
    return tag("ul", items, class_="key")
