"""The plot of a sweep: loss over the share of a trial's budget, the held-out loss as dots at each pause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from .figures import number_text, share_text
from .report_charts import SCALE, thin, value_axis
from .report_html import Html, el
from .sweep_state import Trial
from .tracking import read_jsonl

Points = list[tuple[float, float]]
WARM = 0.25
"""The training loss before this part of a trial's first leg does not set the range of the axis."""
LEGEND = 12
WINDOW = 1 / 40
"""Of all steps that the longest trial made: over so many, at least three, the training loss is smoothed."""
AIR = 1.012
COLORS = (
    (250, 70, 60), (210, 85, 52), (180, 80, 38), (145, 65, 38), (85, 65, 38),
    (45, 90, 45), (22, 90, 52), (350, 75, 52), (305, 55, 55),
)  # fmt: skip
"""Hue, saturation and lightness from the first trial to the last, readable on a light and on a dark page."""


@dataclass(frozen=True)
class Curve:
    """One trial. shade: its place among the trials, 0 to 1; training: (progress, smoothed loss)."""

    name: str
    shade: float
    won: bool
    failed: bool
    training: Points
    held_out: Points


def curve_of(trial: Trial, folder: Path, shade: float, window: float) -> Curve:
    """From a trial's log and the sweep's state. window: steps that the training loss is smoothed over."""
    records = [r for r in read_jsonl(folder / "metrics.jsonl") if r["loss"] is not None]
    losses = _smooth([record["loss"] for record in records], window)
    training = list(zip([record["progress"] for record in records], losses, strict=True))
    held_out = [(leg.progress, leg.loss) for leg in trial.legs if leg.loss is not None]
    return Curve(trial.name, shade, trial.state == "won", trial.state == "failed", training, held_out)


def rung_chart(curves: Sequence[Curve], pauses: Sequence[float]) -> Html:
    """The figure; the last of `curves` is drawn on top. Empty when there is nothing to draw.

    The axis along is a root of the share, since all trials are compared in its first tenth and one is left
    in its last half.
    """
    shown = _range(curves, pauses)
    if shown is None:
        return Html()
    bottom, top = shown
    ticks = [tick for tick in value_axis(bottom, top)[0] if bottom <= tick <= top]
    marks = (0.0, *pauses, 1.0)
    grid = [el("line", x1=0, x2=SCALE, y1=y, y2=y) for y in (_y(tick, bottom, top) for tick in ticks)]
    grid += [el("line", x1=x, x2=x, y1=0, y2=SCALE) for x in map(_x, marks[1:])]
    svg = el(
        "svg",
        el("g", *grid, cls="grid"),
        *(part for curve in curves for part in _drawn(curve, bottom, top)),
        viewBox=f"0 0 {SCALE} {SCALE}",
        preserveAspectRatio="none",
        role="img",
        aria_label="loss of all trials",
    )
    ys = [
        el("span", number_text(tick), style=f"bottom:{100 * (tick - bottom) / (top - bottom):.2f}%")
        for tick in ticks
    ]
    xs = [el("span", share_text(mark), style=f"left:{100 * _x(mark) / SCALE:.2f}%") for mark in marks]
    best = list(reversed(curves))
    keys = [
        el("span", el("b", curve.name) if curve.won else curve.name, cls="key", style=colored(curve.shade))
        for curve in best[:LEGEND]
    ]
    if len(best) > LEGEND:
        keys.append(el("span", f"and {len(best) - LEGEND} more"))
    note = el("span", "lines: training, smoothed · dots: held out", cls="note")
    caption = el("figcaption", el("b", "Loss over the share of a trial's budget"), note)
    plot = el("div", el("div", *ys, cls="ys"), svg, el("div", *xs, cls="xs"), cls="plot")
    return el("figure", caption, plot, el("div", *keys, cls="legend"), cls="chart wide")


def colored(shade: float) -> str:
    """The style with a trial's color, by its place in the grid from 0 to 1."""
    at = shade * (len(COLORS) - 1)
    low = min(int(at), len(COLORS) - 2)
    part = at - low
    hue, saturation, lightness = (
        (1 - part) * a + part * b for a, b in zip(_unwound(low), _unwound(low + 1), strict=True)
    )
    return f"--c:hsl({hue % 360:.0f} {saturation:.0f}% {lightness:.0f}%)"


def _drawn(curve: Curve, bottom: float, top: float) -> list[Html]:
    xs, ys = [x for x, _ in curve.training], [y for _, y in curve.training]
    line = " ".join(f"{_x(x)},{_y(y, bottom, top)}" for x, y in thin(xs, ys))
    width, opacity = (3, 1) if curve.won else (1.4, 0.6)
    color = colored(curve.shade)
    # A dot above the range is drawn at its edge: where it was is in the table.
    dots = "".join(f"M{_x(x)} {max(0, _y(y, bottom, top))}h0" for x, y in curve.held_out)
    parts = []
    if line:
        style = f"{color};stroke-width:{width};opacity:{opacity}"
        parts.append(el("polyline", el("title", curve.name), points=line, style=style))
    if dots:
        size = 12 if curve.won else 8
        parts.append(
            el("path", el("title", curve.name), d=dots, cls="mark", style=f"{color};stroke-width:{size}")
        )
    return parts


def _range(curves: Sequence[Curve], pauses: Sequence[float]) -> tuple[float, float] | None:
    """Lowest and highest value, less the beginning, failures and what is far above the middle; with room."""
    warm = WARM * min(pauses, default=1.0)
    values = [y for c in curves if not c.failed for x, y in (*c.training, *c.held_out) if x >= warm]
    values = values or [y for curve in curves for _, y in (*curve.training, *curve.held_out)]
    if not values:
        return None
    low, middle, high = min(values), sorted(values)[len(values) // 2], max(values)
    high = min(high, middle + 2 * (middle - low)) if middle > low else high
    room = 0.04 * (high - low) or 0.1
    return low - room, high + room


def _x(share: float) -> int:
    return round(SCALE * sqrt(max(0.0, share)) / AIR)


def _unwound(number: int) -> tuple[int, int, int]:
    """A color whose hue falls all the way, through 0 to below."""
    hue, saturation, lightness = COLORS[number]
    return hue - 360 if number > 6 else hue, saturation, lightness


def _smooth(ys: Sequence[float], window: float) -> list[float]:
    """Exponential mean over about `window` values, without the bias of its beginning."""
    keep = 1 - 2 / (max(3.0, window) + 1)
    mean, weight, found = 0.0, 0.0, []
    for value in ys:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(mean / weight)
    return found


def _y(value: float, bottom: float, top: float) -> int:
    return round(SCALE * (1 - (value - bottom) / (top - bottom)))
