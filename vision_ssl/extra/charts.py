"""Charts as inline SVG, whose colours follow the page's. Series differ by dashes or marks too, not by colour alone."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .html import Child, Markup, figure, tag

# A chart is this wide in its own units, which on a phone are about pixels: so its text stays legible there.
WIDTH, HEIGHT = 340, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 30, 36
_LONGEST = 32  # letters of a name beside an interval
_NUMBER = 34  # width of a number in bold
_POINTS = 300  # a line has no more, which is what a screen can show
_DASHES = (None, "6 3", "2 3", "8 3 2 3")
# Marks in a square from -3 to 3, each as a closed path.
_MARKS = (
    "m-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0z",
    "m-3 2.5h6l-3-5.5z",
    "m-2.3-2.3h4.6v4.6h-4.6z",
    "m0-3.4l3 3.4l-3 3.4l-3-3.4z",
)
_COLOURS = 7  # of series; the eighth is the background's

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
    named = [line for line in lines if line.label]
    drawn = [
        tag(
            "path",
            class_="line faint" if line.faint else "line",
            d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(across(line.x), up(line.y), strict=True)),
            stroke=colour(line.series),
            stroke_dasharray=None if not line.label else _DASHES[line.series % len(_DASHES)],
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
    return Markup(chart + (_key([line.label for line in named], swatches, width=26) if named else ""))


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float]], unit: str, *, highest: float) -> Markup:
    """Draw values with their intervals, one below the other.

    Args:
        title: What it shows; it stands above.
        rows: Name, value, low end, high end.
        unit: Written below.
        highest: The axis goes from 0 to at least this, so that charts with the same one can be compared.
    """
    names = [name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name, *_ in rows]
    left, top, step = 6 * max(map(len, names)) + 12, 24, 26
    bottom = top + step * len(rows)
    marks = ticks(0.0, highest)
    across = _Scale(marks, left, WIDTH - 12)
    drawn: list[Child] = [tag("text", title, x=0, y=11, class_="name")]
    for mark in marks:
        x = f"{across(mark):.1f}"
        drawn.append(tag("line", class_="grid", x1=x, x2=x, y1=top, y2=bottom))
        drawn.append(tag("text", f"{mark:g}", x=x, y=bottom + 15, text_anchor="middle"))
    for row, (name, (_, value, *interval)) in enumerate(zip(names, rows, strict=True)):
        y = top + step * row + step // 2
        low, high = (f"{across(end):.1f}" for end in interval)
        is_beside_name = float(low) < left + _NUMBER
        drawn += [
            tag("text", name, x=0, y=y + 4, class_="name"),
            tag("path", class_="line", d=f"M{low} {y}H{high}M{low} {y - 4}v8M{high} {y - 4}v8", stroke=colour(row)),
            tag("circle", cx=f"{across(value):.1f}", cy=y, r=4, fill=colour(row)),
            tag(
                "text",
                f"{value:.1f}",
                x=float(high) + 6 if is_beside_name else float(low) - 6,
                y=y + 4,
                class_="value",
                text_anchor="start" if is_beside_name else "end",
            ),
        ]
    drawn.append(tag("text", unit, x=(left + WIDTH - 12) / 2, y=bottom + 32, text_anchor="middle"))
    spoken = "; ".join(f"{name} {value:.1f} ({low:.1f} to {high:.1f})" for name, value, low, high in rows)
    return _svg(f"{title}: {spoken}", bottom + 38, drawn)


def scatter(title: str, groups: Sequence[Group], *, x_label: str, y_label: str) -> Markup:
    """Draw points in two dimensions, on equal scales.

    Args:
        title: What it shows, for those who do not see it.
        groups: Those in the background first.
        x_label: Of what grows to the right.
        y_label: Of what grows upwards.
    """
    points = np.concatenate([group.points for group in groups])
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    margin, head, foot = 6, 22, 22
    scale = (WIDTH - 2 * margin) / max(*extent, 1e-12)
    bottom = head + scale * extent[1]
    drawn: list[Child] = [
        tag("text", f"↑ {y_label}", x=0, y=8),
        tag("text", f"{x_label} →", x=WIDTH, y=f"{bottom + foot - 3:.1f}", text_anchor="end"),
    ]
    for group in groups:
        at = (group.points - low) * scale
        d = "".join(f"M{margin + x:.1f} {bottom - y:.1f}{_mark(group.series)}" for x, y in at)
        drawn.append(tag("path", d=d, **_fill(group.series)))
    named = [group for group in groups if group.series is not None]
    swatches = (tag("path", d=f"M5 5{_mark(group.series)}", **_fill(group.series)) for group in named)
    key = _key([group.label for group in named], swatches, width=10)
    return Markup(tag("div", _svg(title, bottom + foot, drawn), class_="map") + key)


def panels(charts: Iterable[Markup], caption: Child) -> Markup:
    """Charts beside each other, or below each other on a phone."""
    return figure(tag("div", (tag("div", chart) for chart in charts), class_="panels"), caption)


def colour(series: int) -> str:
    """The colour of a series, as the page defines it."""
    return f"var(--c{series % _COLOURS})"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, at most about five steps of 1, 2 or 5 times a power of ten, that enclose `low` and `high`."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


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
    drawn.append(tag("text", x_label, x=(WIDTH - _RIGHT + _LEFT) / 2, y=HEIGHT - 4, text_anchor="middle"))
    drawn.append(tag("text", y_label, x=0, y=11, class_="name"))
    return drawn


def _thinned(line: Line) -> Line:
    """The line with at most `_POINTS` points, the first and the last among them."""
    if len(line.x) <= _POINTS:
        return line
    chosen = np.linspace(0, len(line.x) - 1, _POINTS).round().astype(np.int64)
    return Line(line.label, line.x[chosen], line.y[chosen], line.series, line.faint)


def _svg(title: str, height: float, content: Child) -> Markup:
    return tag("svg", content, role="img", aria_label=title, viewBox=f"0 0 {WIDTH} {height:.0f}")


def _mark(series: int | None) -> str:
    """A closed path. There are four and seven colours, so that 28 series differ in one or the other."""
    return _MARKS[(series or 0) % len(_MARKS)]


def _fill(series: int | None) -> dict[str, str]:
    return {"class": "other", "fill": f"var(--c{_COLOURS})"} if series is None else {"fill": colour(series)}


def _key(labels: Sequence[str], swatches: Iterable[Markup], *, width: int) -> Markup:
    items = (
        tag("li", tag("svg", swatch, viewBox=f"0 0 {width} 10", aria_hidden="true"), label)
        for label, swatch in zip(labels, swatches, strict=True)
    )
    return tag("ul", items, class_="key")
