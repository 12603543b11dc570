"""sweep.html: one offline file with the curves of all trials and the table."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import resources

from .report_html import Html, el, join, table
from .rundir import write_text
from .sweep_chart import WINDOW, Curve, colored, curve_of, rung_chart
from .sweep_costs import amount_text
from .sweep_grid import Job
from .sweep_plan import Ladder
from .sweep_rows import header_cells, in_order, reasons, result_rows
from .sweep_state import State

PAGE = "sweep.html"


def write_page(job: Job, ladder: Ladder, state: State) -> None:
    """Write sweep.html from the state and the trials' logs, finished or not."""
    write_text(job.output / PAGE, render(job, ladder, state))


def render(job: Job, ladder: Ladder, state: State) -> str:
    """The whole page, in the frame of a run's report."""
    order = [trial.name for trial in state.trials]
    shades = {name: number / max(1, len(order) - 1) for number, name in enumerate(order)}
    window = WINDOW * max((leg.step for trial in state.trials for leg in trial.legs), default=0)
    curves = [
        curve_of(trial, job.folder(trial.name), shades[trial.name], window)
        for trial in reversed(in_order(state))
    ]
    parts = [
        _header(job, state),
        rung_chart(curves, ladder.pauses),
        _table(job, ladder, state, curves),
        _end(job),
    ]
    values = {
        "title": escape(f"{job.output.name} · sweep · shoestring"),
        "body": "\n".join(parts),
        "script": "",
        "script_hash": base64.b64encode(hashlib.sha256(b"").digest()).decode(),
    }
    frame = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    first, *pieces = frame.split("{{")
    return first + "".join(values[name] + rest for name, rest in (p.split("}}", 1) for p in pieces))


def _header(job: Job, state: State) -> Html:
    over = " · ".join(f"{axis.key} {', '.join(axis.values)}" for axis in job.axes)
    done = state.winner is not None
    line = f"best: {state.winner}" if done else "not finished when this was written"
    return el(
        "header",
        el("h1", f"{job.output.name}: {len(state.trials)} trials in {amount_text(job.amount, job.unit)}"),
        el("span", line, cls=f"badge {'done' if done else 'running'}"),
        el("p", over),
    )


def _table(job: Job, ladder: Ladder, state: State, curves: list[Curve]) -> Html:
    shade = {curve.name: curve.shade for curve in curves}
    rows = []
    for row in result_rows(ladder, state, job.amount):
        first, *others = row.cells
        mark = el("span", cls="swatch", style=colored(shade[row.trial.name]))
        style = "figure best" if row.won else "figure"
        rows.append([el("td", mark, first, cls=style), *(el("td", cell, cls=style) for cell in others)])
    lines = [el("p", line) for line in reasons(state)]
    return join(
        [
            el("h2", "Held-out loss at each pause, and what each trial spent of the budget"),
            el("div", table(rows, header_cells(ladder)), cls="panel scroll"),
            el("h2", "Why"),
            el("div", *lines, cls="panel"),
        ]
    )


def _end(job: Job) -> Html:
    return el(
        "footer",
        f"Made by shoestring from the files in {job.output}. At a pause the rate has not come down yet, "
        "which makes low rates look better than they will be at the end.",
    )
