"""What a report says of a run with several budgets or several objectives, one after the other."""

from __future__ import annotations

from .figures import duration_text, number_text
from .report_data import RunData
from .report_html import Html, el, section, table


def legs(run: RunData) -> Html:
    """Each budget that the run was given: its rule, what it used and where it landed."""
    if not run.legs:
        return Html()
    summaries = [*run.landed, run.summary if run.finished else {}]
    rules = ["the recipe's schedule", *(str(leg.get("why")) for leg in run.legs)]
    begins = [(0, 0.0), *((leg.get("step") or 0, leg.get("seconds") or 0.0) for leg in run.legs)]
    rows = []
    for number, (rule, (step, seconds)) in enumerate(zip(rules, begins, strict=True)):
        summary = summaries[number] if number < len(summaries) else {}
        took = summary.get("seconds")
        rows.append(
            [
                f"leg {number + 1}",
                rule,
                f"{step:,}",
                duration_text(None if took is None else took - seconds),
                f"{summary['steps'] - step:,}" if summary.get("steps") is not None else "–",
                number_text(summary.get("eval_loss")),
            ]
        )
    head = ["", "how it went on", "from step", "took", "steps", "held-out loss"]
    return section("Legs", [el("div", table(rows, head), cls="panel scroll")])


def stages(run: RunData) -> Html:
    """What the stages after the first measured, before and after."""
    panels = []
    for name, events in run.stage_evals.items():
        skip = ("event", "kind", "seconds", "step", "duration", "stage")
        names = [key for key in events[-1] if key not in skip]
        rows = [[key, number_text(events[0].get(key)), number_text(events[-1].get(key))] for key in names]
        panels.append(el("div", el("h3", name), table(rows, ["held out", "before", "after"]), cls="panel"))
    return section("Stages", panels)
