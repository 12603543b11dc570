"""A picture of what benchmarks/ops.py measured: how many times ours each contender takes."""

from __future__ import annotations

from pathlib import Path

from ops_timing import Row


def draw(rows: list[Row], path: Path, title: str) -> None:
    """One dot a contender on a line an operation, by time over ours, logarithmic; ours is the line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if "ours" in row.seconds and len(row.seconds) > 1]
    figure, axes = pyplot.subplots(figsize=(11, 0.3 * len(shown) + 1.5), layout="constrained")
    names = sorted({name for row in shown for name in row.seconds if name != "ours"})
    colours = pyplot.get_cmap("tab20").colors
    for index, name in enumerate(names):
        points = [
            (row.seconds[name] / row.seconds["ours"], y)
            for y, row in enumerate(reversed(shown))
            if name in row.seconds
        ]
        marker = "os^Dv"[index % 5]
        axes.plot(*zip(*points, strict=True), marker, color=colours[index % 20], markersize=8, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.set_yticks(range(len(shown)), [row.name for row in reversed(shown)], fontsize=8)
    axes.set_xlabel("time over ours: right of the line ours is quicker")
    axes.set_ylim(-0.6, len(shown) - 0.2)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=7)  # above the legend too, which it may be longer than
    figure.savefig(path, dpi=110)
