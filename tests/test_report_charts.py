"""The hand-made charts: axes, thinning, smoothing and what the SVG holds."""

from __future__ import annotations

import math
import re

import pytest
from shoestring.train.report_charts import (
    Series,
    line_chart,
    smooth,
    stacked_bar,
    thin,
    time_axis,
    time_label,
    value_axis,
)
from shoestring.train.report_html import el, join, table


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (1.9, 3.4), (0, 1e-3), (-5, 7), (0, 1.98e9), (2.0, 2.0), (0, 0), (1e-12, 2e-12), (-3, -1)],
)
def test_value_axes_enclose_their_data_with_round_ticks(low: float, high: float) -> None:
    ticks, bottom, top = value_axis(low, high)
    assert bottom <= low <= high <= top
    assert bottom < top
    assert 3 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(mantissa == pytest.approx(nice, rel=1e-6) for nice in (1, 2, 2.5, 5, 10))


@pytest.mark.parametrize("end", [0.0, 0.4, 3, 59, 60, 61, 179, 3600, 7200, 86_400, 1_000_000, 1e8])
def test_time_axes_have_few_ticks_from_zero(end: float) -> None:
    ticks, last = time_axis(end)
    assert ticks[0] == 0
    assert ticks[-1] <= last
    assert last >= end
    assert len(ticks) <= 7


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (0.5, "0.5 s"), (90, "1.5 min"), (7200, "2 h"), (86_400, "24 h"), (259_200, "3 d")],
)
def test_time_labels(seconds: float, text: str) -> None:
    assert time_label(seconds) == text


def test_thinning_keeps_the_ends_of_every_spike() -> None:
    xs = list(range(10_000))
    ys = [0.0] * 10_000
    ys[1234], ys[7777] = 5.0, -3.0
    kept = thin(xs, ys)
    assert len(kept) <= 400
    assert (1234, 5.0) in kept
    assert (7777, -3.0) in kept
    assert kept == sorted(kept)
    assert thin(xs[:50], ys[:50]) == list(zip(xs[:50], ys[:50], strict=True))


def test_smoothing_has_no_bias_at_the_beginning() -> None:
    assert smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    assert smooth([]) == []
    noisy = [1.0 + (-1) ** i for i in range(1000)]
    assert max(abs(value - 1.0) for value in smooth(noisy)[100:]) < 0.1


def test_points_lie_where_the_axes_say() -> None:
    html = line_chart("Loss", [Series("a", [0.0, 50.0, 100.0], [0.0, 5.0, 10.0])], zero=True)
    points = re.search(r'points="([^"]*)"', html)
    assert points is not None
    assert points[1] == "0,10000 4975,5000 9950,0"  # half a percent of air at the right
    assert 'data-x="100.49999999999999"' in html
    assert 'data-y0="0.0" data-y1="10.0"' in html


def test_one_spike_does_not_flatten_a_raw_curve() -> None:
    ys = [1.0 + 0.001 * i for i in range(200)]
    ys[100] = 1e6
    html = line_chart("Loss", [Series("a", list(range(200)), ys, style="raw")])
    top = re.search(r'data-y1="([^"]*)"', html)
    assert top is not None
    assert float(top[1]) < 2


def test_a_single_point_and_none() -> None:
    assert 'class="mark"' in line_chart("Loss", [Series("held out", [3.0], [2.0], style="dots")])
    assert line_chart("Loss", [Series("a", [], [])]) == ""


def test_bars_fill_their_width() -> None:
    html = stacked_bar({"weights": 1.0, "logits": 3.0}, str, 8.0)
    assert re.findall(r"width:([\d.]+)%", html) == ["12.50", "37.50"]


def test_strings_are_escaped_and_html_is_not() -> None:
    assert (
        el("p", "<b>", el("i", '"&'), title='"x"')
        == '<p title="&quot;x&quot;">&lt;b&gt;<i>&quot;&amp;</i></p>'
    )
    assert join(["<", el("b", "<")]) == "&lt;<b>&lt;</b>"
    assert table([["<td>"]], ["<"]) == "<table><tr><th>&lt;</th></tr><tr><td>&lt;td&gt;</td></tr></table>"
