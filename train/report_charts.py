"""Charts as inline SVG and HTML, by hand.

Why not a plotting library: importing one and drawing eight charts costs about a second of the budget each
time, freezes the colors of one theme and writes text that shrinks on a phone. Here the SVG holds only lines
(stretched to its box, strokes of constant width); labels are HTML at percent positions, so they keep their
size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .figures import bytes_text, count_text, number_text, share_text
from .report_html import Html, color, el

SCALE = 10_000  # the SVG's own units along both axes
MOST_POINTS = 400
MOST_TIME_TICKS = 6.5
TIME_STEPS = (
    0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400,
)  # fmt: skip

FORMATS: dict[str, Callable[[float], str]] = {
    "number": number_text,
    "bytes": lambda value: _without_zeros(bytes_text(value)),
    "count": lambda value: _without_zeros(count_text(value)),
    "share": share_text,
    "watts": lambda value: f"{value:.0f} W",
}


@dataclass(frozen=True)
class Series:
    """Points of one curve, sorted by x. `color` is 0 to 7; `style` is "line", "raw" (faint) or "dots"."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0
    style: str = "line"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    kind: str = "number",
    zero: bool = False,
    wide: bool = False,
    note: str = "",
    marks: Sequence[tuple[float, str]] = (),
) -> Html:
    """A figure with curves over seconds; empty when there is nothing to draw.

    `marks` are upright lines at some seconds, each with its word. `kind` says how values are written (a key
    of FORMATS); `zero` makes the axis begin at 0.
    """
    series = [one for one in series if len(one.xs) > 0]
    if not series:
        return Html()
    x_ticks, x_end = time_axis(max(one.xs[-1] for one in series))
    y_ticks, bottom, top = value_axis(*_range(series, zero))
    grid = [_grid_line(_y(tick, bottom, top)) for tick in y_ticks]
    curves = [_curve(one, x_end, bottom, top) for one in series]
    y_labels = [
        el("span", FORMATS[kind](tick), style=f"bottom:{_percent((tick - bottom) / (top - bottom))}")
        for tick in y_ticks
    ]
    words = [el("span", word, style=f"left:{_percent(x / x_end)}") for x, word in marks if x <= x_end]
    x_labels = [el("span", time_label(tick), style=f"left:{_percent(tick / x_end)}") for tick in x_ticks]
    keys = [el("span", one.name, cls=f"key {one.style}", style=color(one.color)) for one in series]
    aside = [el("span", note, cls="note")] if note else []
    svg = el(
        "svg",
        el("g", *grid, cls="grid"),
        el("g", *(_mark_line(round(SCALE * x / x_end)) for x, _ in marks if x <= x_end), cls="marks"),
        *curves,
        viewBox=f"0 0 {SCALE} {SCALE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=title,
    )
    plot = el(
        "div",
        el("div", *y_labels, cls="ys"),
        svg,
        el("div", *x_labels, cls="xs"),
        *([el("div", *words, cls="words")] if words else []),
        cls="plot",
        data_x=repr(x_end),
        data_y0=repr(bottom),
        data_y1=repr(top),
        data_kind=kind,
    )
    caption = el("figcaption", el("b", title), *(keys if len(series) > 1 else ()), *aside)
    return el("figure", caption, plot, cls="chart wide" if wide else "chart")


def stacked_bar(parts: Mapping[str, float], write: Callable[[float], str], whole: float = 0.0) -> Html:
    """One horizontal bar of named parts; `whole` is the value of the full width, if more than their sum."""
    whole = max(whole, sum(parts.values())) or 1.0
    return el(
        "div",
        *(
            el("i", style=f"width:{_percent(size / whole)};{color(index)}", title=f"{name} {write(size)}")
            for index, (name, size) in enumerate(parts.items())
        ),
        cls="bar",
    )


def plain_bar(share: float, style: str, cls: str = "bar") -> Html:
    """A bar filled to `share` of its width."""
    return el("div", el("i", style=f"width:{_percent(min(1.0, share))};{style}"), cls=cls)


def legend(parts: Mapping[str, float], write: Callable[[float], str]) -> Html:
    """The names and sizes of a bar's parts."""
    return el(
        "div",
        *(
            el("span", f"{name} ", el("b", write(size)), cls="key block", style=color(index))
            for index, (name, size) in enumerate(parts.items())
        ),
        cls="legend",
    )


def smooth(ys: Sequence[float]) -> list[float]:
    """Exponential mean over about a thirtieth of the points, without the bias of its beginning."""
    keep = 1 - 2 / (max(3.0, len(ys) / 30) + 1)
    mean, weight, found = 0.0, 0.0, []
    for value in ys:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(mean / weight)
    return found


def thin(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: lowest and highest of each bucket in order, so that no peak is lost."""
    if len(xs) <= most:
        return list(zip(xs, ys, strict=True))
    size = len(xs) / (most // 2)
    found = []
    for bucket in range(most // 2):
        indices = range(int(bucket * size), int((bucket + 1) * size))
        low, high = min(indices, key=ys.__getitem__), max(indices, key=ys.__getitem__)
        found += [(xs[index], ys[index]) for index in sorted({low, high})]
    return found


def time_axis(end: float) -> tuple[list[float], float]:
    """(ticks, end of the axis) in seconds: up to seven round times from 0."""
    end = max(1.005 * end, 1e-3)  # a little air, so that the last dot is whole
    fitting = (step for step in TIME_STEPS if end / step <= MOST_TIME_TICKS)
    step = next(fitting, math.ceil(end / MOST_TIME_TICKS / 86400) * 86400)
    return [index * step for index in range(int(end / step) + 1)], end


def value_axis(low: float, high: float) -> tuple[list[float], float, float]:
    """(ticks, bottom, top): three to seven round values that enclose [low, high]."""
    if not high > low:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999) * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    return ticks, ticks[0], ticks[-1]


def time_label(seconds: float) -> str:
    """A tick's time in its own unit: 90 -> "1.5 min"."""
    for unit, size in (("d", 172_800), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / min(size, 86_400):g} {unit}"
    return f"{seconds:g} s" if seconds else "0"


def _without_zeros(text: str) -> str:
    """A tick's "1.50 GB" is "1.5 GB": ticks are round."""
    number, *unit = text.split(" ")
    return " ".join([number.rstrip("0").rstrip(".") if "." in number else number, *unit])


def _range(series: Sequence[Series], zero: bool) -> tuple[float, float]:
    """Lowest and highest value shown: of faint raw curves only the middle 98 %, or one spike flattens all."""
    low, high = math.inf, -math.inf
    for one in series:
        values = sorted(one.ys)
        cut = len(values) // 100 if one.style == "raw" else 0
        low, high = min(low, values[cut]), max(high, values[len(values) - 1 - cut])
    return (min(0.0, low), max(0.0, high)) if zero else (low, high)


def _curve(one: Series, x_end: float, bottom: float, top: float) -> Html:
    dots = one.style == "dots"
    points = list(zip(one.xs, one.ys, strict=True)) if dots else thin(one.xs, one.ys)
    places = [(round(SCALE * x / x_end), _y(y, bottom, top)) for x, y in points]
    text = " ".join(f"{x},{y}" for x, y in places)
    line = el("polyline", data_name=one.name, cls=one.style, style=color(one.color), points=text)
    if not dots:
        return line
    marks = "".join(f"M{x} {y}h0" for x, y in places)  # round caps of a line without length are round dots
    return Html(line + el("path", cls="mark", style=color(one.color), d=marks))


def _grid_line(y: int) -> Html:
    return el("line", x1=0, x2=SCALE, y1=y, y2=y)


def _mark_line(x: int) -> Html:
    return el("line", x1=x, x2=x, y1=0, y2=SCALE)


def _y(value: float, bottom: float, top: float) -> int:
    return round(SCALE * (1 - (value - bottom) / (top - bottom)))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
