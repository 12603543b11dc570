"""The lower part of a report: decisions, recipe with origins, differences, machine, events."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .figures import bytes_text, duration_text, number_text
from .report_data import RunData
from .report_html import Html, el, fold, join, section, swatch, table

# A line of resolved.yaml: "  learning_rate: 2.0e-4  # recipe.yaml:14"
LINE = re.compile(r"^(?P<key>\s*(?:- )?[^:#]+:)(?P<value>.*?)(?P<origin>  # \S.*)$")


def decisions(run: RunData) -> Html:
    """The plan's reasons."""
    reasons = run.plan.get("reasons")
    if not isinstance(reasons, Mapping) or not reasons:
        return Html()
    rows = [(el("code", str(key)), str(reason)) for key, reason in reasons.items()]
    return fold("What the plan decided, and why", f"{len(rows)} decisions", table(rows))


def recipe(run: RunData) -> Html:
    """resolved.yaml; what somebody chose stands out from the defaults."""
    if not run.resolved:
        return Html()
    lines, chosen = [], 0
    for line in run.resolved.splitlines():
        match = LINE.match(line)
        if match is None:
            lines.append(join([line, "\n"]))
            continue
        default = match["origin"].strip() == "# default"
        chosen += not default
        value = match["value"] if default else el("mark", match["value"])
        lines.append(join([match["key"], value, el("i", match["origin"]), "\n"]))
    aside = f"{chosen} values are not defaults"
    return fold("Recipe, and where each value came from", aside, el("pre", *lines))


def differences(runs: Sequence[RunData]) -> Html:
    """Keys whose values differ between the recipes."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.recipe):
        values = [run.recipe.get(key) for run in runs]
        if key != "output_dir" and any(value != values[0] for value in values):
            rows.append([el("code", key), *(plain(value) for value in values)])
    if not rows:
        return section("Differences", [el("div", "The recipes are the same.", cls="panel")])
    head = ["key", *(join([swatch(number), run.name]) for number, run in enumerate(runs))]
    return section("Differences", [el("div", table(rows, head), cls="panel scroll")])


def machine(run: RunData) -> Html:
    """environment.json as a table."""
    rows = []
    for key, value in dotted(run.environment).items():
        is_size = key.endswith("_bytes") and isinstance(value, int)
        rows.append((el("td", key, cls="soft"), bytes_text(value) if is_size else plain(value)))
    return fold("Machine and software", run.device, table(rows)) if rows else Html()


def log(run: RunData) -> Html:
    """All events but the evaluations, which are in the chart."""
    rows = []
    for event in run.events:
        if event.get("event") == "eval":
            continue
        rest = [
            f"{key} {plain(value)}"
            for key, value in event.items()
            if key not in ("event", "seconds", "step", "kind") and value is not None
        ]
        time, step = duration_text(event.get("seconds")), plain(event.get("step"))
        rows.append([el("td", time, cls="figure"), step, str(event.get("event")), ", ".join(rest)])
    if not rows:
        return Html()
    return fold("Events", f"{len(rows)}", el("div", table(rows, ["time", "step", "event", ""]), cls="scroll"))


def dotted(value: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of mappings, as one level with dotted keys."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    found: dict[str, Any] = {}
    for key, item in items:
        listed = isinstance(item, list) and any(isinstance(one, Mapping) for one in item)
        nested = isinstance(item, Mapping) or listed
        found |= dotted(item, f"{prefix}{key}.") if nested else {f"{prefix}{key}": item}
    return found


def plain(value: Any) -> str:
    """A value of YAML or JSON for a reader."""
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None or value == "" else str(value)
