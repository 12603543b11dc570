"""report.html: one offline file about one run, or about several side by side."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from . import report_details as details
from . import report_legs as parts_of_budget
from . import report_sections as sections
from .report_data import RunData, read_run
from .report_html import Html, el
from .rundir import write_text


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one HTML file about the runs in `run_dirs` to `out`, from what lies in their directories.

    The file asks for nothing from outside, and its content policy forbids that it could. An unfinished run
    gives a report of what there is so far. Raises UserError when a directory holds no run.
    """
    runs = [read_run(Path(path)) for path in run_dirs]
    if not runs:
        raise ValueError("no run directories")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(runs))
    return out


def render(runs: Sequence[RunData]) -> str:
    """The whole page."""
    here = resources.files(__package__)
    script = (here / "report.js").read_text(encoding="utf-8")
    names = ", ".join(run.name for run in runs)
    values = {
        "title": escape(f"{names} · shoestring"),
        "body": _single(runs[0]) if len(runs) == 1 else _several(runs),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    page = (here / "report.html").read_text(encoding="utf-8")
    pieces = page.split("{{")  # in one pass: a value that holds {{...}} itself is not replaced again
    return pieces[0] + "".join(
        values[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:])
    )


def _single(run: RunData) -> str:
    runs = [run]
    parts = [
        sections.header(runs),
        sections.warnings(runs),
        sections.headline(run),
        parts_of_budget.legs(run),
        parts_of_budget.stages(run),
        sections.curves(runs),
        sections.samples(runs),
        sections.memory(runs),
        sections.time_spent(runs),
        el("h2", "Details"),
        details.decisions(run),
        details.recipe(run),
        details.machine(run),
        details.log(run),
        _footer(runs),
    ]
    return "\n".join(part for part in parts if part)


def _several(runs: Sequence[RunData]) -> str:
    parts = [
        sections.header(runs),
        sections.warnings(runs),
        sections.comparison(runs),
        details.differences(runs),
        sections.curves(runs),
        sections.samples(runs),
        sections.memory(runs),
        sections.time_spent(runs),
        _footer(runs),
    ]
    return "\n".join(part for part in parts if part)


def _footer(runs: Sequence[RunData]) -> Html:
    places = ", ".join(str(run.path) for run in runs)
    return el("footer", f"Made by shoestring from the files in {places}. What was not measured is left out.")
