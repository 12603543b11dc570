"""Table and picture of what benchmarks/adapters.py wrote."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
LOSSES = "| | trained | steps | seconds taken | rate | loss by rate | held-out loss | each seed |"
COSTS = "| | step in turns, s | in its runs | start, s | memory, MB | of it state, MB |"


def of(records: Sequence[Record], kind: str, method: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind and record.get("method") == method]


def final_runs(records: Sequence[Record], method: str) -> list[Record]:
    """Those with the number of steps that was settled on: the last one that has all seeds."""
    by_steps: dict[int, list[Record]] = {}
    for run in of(records, "run", method):
        by_steps.setdefault(run["steps"], []).append(run)
    seeds = max(map(len, by_steps.values()), default=0)
    whole = [runs for runs in by_steps.values() if len(runs) == seeds]
    return whole[-1] if whole else []


def methods(records: Sequence[Record]) -> list[str]:
    """Those with runs, the lowest mean loss first."""
    found = {record["method"] for record in records if record["kind"] == "run"}
    return sorted(found, key=lambda name: statistics.mean(run["loss"] for run in final_runs(records, name)))


def losses_line(records: Sequence[Record], method: str) -> str:
    """What was trained for how long, and what it gave."""
    runs, trials = final_runs(records, method), of(records, "trial", method)
    trials.sort(key=lambda trial: float(trial["rate"]))
    best = runs[0]["rate"]
    edge = " (edge)" if best in (trials[0]["rate"], trials[-1]["rate"]) else ""
    tried = ", ".join(f"{trial['loss']:.3f}" for trial in trials)
    losses = [run["loss"] for run in runs]
    taken = ", ".join(f"{run['seconds']:.0f}" for run in runs)
    return (
        f"| `{method}` | {runs[0]['trained']:,} | {runs[0]['steps']} | {taken} | {best:.1e}{edge} | {tried} "
        f"| **{statistics.mean(losses):.3f}** | {', '.join(f'{loss:.3f}' for loss in losses)} |"
    )


def costs_line(records: Sequence[Record], method: str) -> str:
    """Time of a step and of the start, and memory."""
    runs, memory = final_runs(records, method), of(records, "memory", method)[0]
    turns = of(records, "step", method)[0]["seconds"]
    own = statistics.median(run["seconds"] / run["steps"] for run in runs)
    start = max(run["start_seconds"] for run in runs)
    return (
        f"| `{method}` | {turns:.1f} | {own:.1f} | {start:.0f} | {memory['peak'] / 1e6:.0f} "
        f"| {memory['state'] / 1e6:.0f} |"
    )


def pairs(records: Sequence[Record]) -> str:
    """Differences of the loss from LoRA's with the same seed, where both have it."""
    lora = {run["seed"]: run["loss"] for run in final_runs(records, "lora")}
    rows = []
    for method in methods(records):
        runs = [run for run in final_runs(records, method) if run["seed"] in lora]
        apart = [run["loss"] - lora[run["seed"]] for run in runs]
        if method != "lora" and apart:
            rows.append(f"| `{method}` | " + ", ".join(f"{value:+.3f}" for value in apart) + " |")
    return "\n".join(["| | loss less LoRA's, seed by seed |", "|---|---|", *rows])


def table(records: Sequence[Record]) -> str:
    """Markdown: the untrained losses, what each method gave, what it cost, and differences from LoRA."""
    setting = next(record for record in records if record["kind"] == "setting")
    untrained = {r["method"]: r["loss"] for r in records if r["kind"] == "untrained"}
    said = ", ".join(f"{loss:.3f} as `{method}` computes it" for method, loss in untrained.items())
    head = f"{setting['seconds']:.0f} s of training each, {setting['trial_seconds']:.0f} s a trial; "
    parts = [head + f"untrained {said}"]
    for columns, line in ((LOSSES, losses_line), (COSTS, costs_line)):
        rows = [line(records, method) for method in methods(records)]
        parts.append("\n".join([columns, "|---" * (columns.count("|") - 1) + "|", *rows]))
    return "\n\n".join([*parts, pairs(records)])


def picture(records: Sequence[Record], path: Path) -> None:
    """Held-out loss of each seed against the numbers trained."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, method in enumerate(methods(records)):
        runs = final_runs(records, method)
        colour = f"C{number}"
        axes.scatter([run["trained"] for run in runs], [run["loss"] for run in runs], s=22, color=colour)
        lowest = min(runs, key=lambda run: float(run["loss"]))
        place = (lowest["trained"], lowest["loss"])
        axes.annotate(method, place, (7, -4), textcoords="offset points", color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("numbers trained")
    axes.set_ylabel("held-out loss, a point for each seed")
    axes.margins(x=0.16)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
