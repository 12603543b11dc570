"""Tables and picture of what benchmarks/pruning_recovery.py wrote."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Record = dict[str, Any]
PUBLISHED = ("cfsp", "flap", "wanda", "random")  # the best first
SHAPES = (
    "| | removed | M parameters | file, MB | prefill, ms | of unpruned | decoding, tokens/s | of unpruned |"
)


def cases(records: Sequence[Record], wanted: float, seed: int) -> dict[str, Record]:
    """By name, the kind of recovery added where it is not the plain one; the unpruned model first."""
    found = {}
    for r in records:
        if r["kind"] == "case" and r["wanted"] in (0.0, wanted) and r["seed"] == seed:
            found[r["method"] if r["recovery"] == "lora" else f"{r['method']}, {r['recovery']}"] = r
    return found


def runs(records: Sequence[Record]) -> list[tuple[float, int]]:
    """(ratio, seed) of what there is."""
    return sorted({(r["wanted"], r["seed"]) for r in records if r["kind"] == "case" and r["wanted"]})


def number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def shapes_table(records: Sequence[Record]) -> str:
    """Size and speed of each shape that was timed; the unpruned model, which took turns, is the measure."""
    timed = [r for r in records if "prefill" in r and r["seed"] == 0 and r["recovery"] == "lora"]
    rows = [
        f"| `{r['method']}` | {r['ratio']:.1%} | {r['parameters'] / 1e6:.1f} | {r['bytes'] / 1e6:.0f} "
        f"| {r['prefill'] * 1e3:.0f} | {r['prefill'] / r['dense_prefill']:.2f} "
        f"| {1 / r['decode']:.1f} | {r['dense_decode'] / r['decode']:.2f} |"
        for r in sorted(timed, key=lambda r: float(r["ratio"]))
    ]
    return "\n".join([SHAPES, "|---" * (SHAPES.count("|") - 1) + "|", *rows])


def costs_table(records: Sequence[Record]) -> str:
    """Seconds and megabytes of the pruning itself, a column for each ratio."""
    columns = [column for column in runs(records) if column[1] == 0]
    found = [cases(records, *column) for column in columns]
    names = [name for name, r in found[0].items() if r["recovery"] == "lora" and "prune_peak" in r]
    head = "| seconds, MB | " + " | ".join(f"{wanted:.0%}" for wanted, _ in columns) + " |"
    rows = []
    for name in names:
        present = (column[name] for column in found if name in column)
        cells = [f"{r['prune_seconds']:.0f}, {r['prune_peak'] / 1e6:.0f}" for r in present]
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([head, "|---" * (len(columns) + 1) + "|", *rows])


def seeds_table(records: Sequence[Record]) -> str:
    """Perplexity before and after the recovery, a column for each ratio and seed."""
    columns = runs(records)
    found = [cases(records, wanted, seed) for wanted, seed in columns]
    names = dict.fromkeys(name for column in found for name in column)
    head = "| | " + " | ".join(f"{wanted:.0%}, seed {seed}" for wanted, seed in columns) + " |"
    rows = []
    for name in names:
        cells = [
            f"{number(c[name]['perplexity'])} → {number(c[name]['recovered'])}" if name in c else ""
            for c in found
        ]
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([head, "|---" * (len(columns) + 1) + "|", *rows])


def orders(records: Sequence[Record]) -> str:
    """Whether each step of the published order holds, for each ratio and seed, before and after."""
    columns = runs(records)
    steps = [*pairwise(PUBLISHED), ("cfsp, refit", "cfsp"), ("shortgpt", "foldgpt")]
    rows = []
    for better, worse in steps:
        cells = []
        for wanted, seed in columns:
            found = cases(records, wanted, seed)
            if better not in found or worse not in found:
                cells.append("")
                continue
            both = (found[better][key] < found[worse][key] for key in ("perplexity", "recovered"))
            cells.append(", ".join("yes" if holds else "no" for holds in both))
        rows.append(f"| `{better}` below `{worse}` | " + " | ".join(cells) + " |")
    head = "| before, after the recovery | " + " | ".join(f"{w:.0%}, seed {s}" for w, s in columns) + " |"
    return "\n".join([head, "|---" * (len(columns) + 1) + "|", *rows])


def table(records: Sequence[Record]) -> str:
    """Markdown: perplexities, what holds of the order, size and speed, and what pruning costs."""
    setting = next(record for record in records if record["kind"] == "setting")
    parts = (seeds_table, orders, shapes_table, costs_table)
    return "\n\n".join([str(setting), *(part(records) for part in parts)])


def picture(records: Sequence[Record], path: Path) -> None:
    """Perplexity after the recovery against the parameters left, seed 0, a line for each criterion."""
    from matplotlib import pyplot

    ratios = list(dict.fromkeys(wanted for wanted, seed in runs(records) if seed == 0))
    found = [cases(records, wanted, 0) for wanted in ratios]
    figure, axes = pyplot.subplots(figsize=(7, 4.4))
    names = [name for name in found[0] if name != "unpruned" and found[0][name]["recovery"] == "lora"]
    for place, name in enumerate(names):
        points = [column[name] for column in found if name in column]
        style = "--" if name in ("random", "magnitude") else ":" if name in ("shortgpt", "foldgpt") else "-"
        across = [r["parameters"] / 1e6 for r in points]
        axes.plot(
            across, [r["recovered"] for r in points], style, marker="o", ms=3.5, color=f"C{place}", label=name
        )
    dense = found[0]["unpruned"]
    axes.plot([dense["parameters"] / 1e6], [dense["recovered"]], "k*", label="unpruned, as much training")
    axes.set_yscale("log")
    axes.set_xlabel("parameters left, millions")
    axes.set_ylabel("perplexity after the recovery")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
