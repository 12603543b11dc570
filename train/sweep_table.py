"""A sweep on the screen: what it will do, and what came of it. The rows are those of the page, too."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .figures import duration_text, share_text
from .sweep_costs import Figures, amount_text
from .sweep_grid import Job
from .sweep_page import PAGE
from .sweep_plan import Ladder, fixed_amount, whole_trial
from .sweep_rows import header_cells, reasons, result_rows
from .sweep_state import State


def show_plan(console: Console, job: Job, ladder: Ladder, figures: Figures) -> None:
    """The rungs, what each costs, and what a whole trial would get."""
    legs = ladder.legs(0, ladder.counts[0])
    whole = whole_trial(job.amount, legs, figures.costs)
    table = Table("trials", "from", "to", "steps each", "all of them", box=box.SIMPLE_HEAD, pad_edge=False)
    for leg in legs:
        spent = leg.count * leg.share * whole + fixed_amount([leg], figures.costs)
        table.add_row(
            str(leg.count),
            share_text(ladder.ends(leg.rung)[0]),
            share_text(leg.until),
            f"{leg.share * whole / figures.step:.0f}",
            f"{amount_text(spent, job.unit)}, {spent / job.amount:.0%}",
        )
    console.print(
        Text(
            f"{len(job.candidates)} trials in {amount_text(job.amount, job.unit)}: {job.source}", style="bold"
        )
    )
    console.print(table)
    lines = [f"a whole trial trains {amount_text(whole, job.unit)}"]
    if job.unit == "time":
        costs = figures.costs
        lines[0] += (
            f"; its process starts in about {costs.first:.0f} s, a pause takes {costs.pause:.0f} s, and the "
            f"landing {costs.landing:.0f} s"
        )
    else:
        training = sum(leg.count * leg.share for leg in legs) * whole / figures.step * figures.step_seconds
        seconds = training + fixed_amount(legs, figures.overheads)
        lines[0] += f"; all of it takes about {duration_text(seconds)} on this machine"
    lines.append(f"trials: {', '.join(candidate.name for candidate in job.candidates)}")
    for line in lines:
        console.print(line, markup=False)


def print_result(console: Console, job: Job, ladder: Ladder, state: State) -> None:
    """The table of all trials, why each stopped, and where the best one is."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="held-out loss at each pause; spent: of the sweep's budget",
        title_justify="left",
        title_style="bold",
    )
    for number, title in enumerate(header_cells(ladder)):
        left = number in (0, len(ladder.pauses) + 2)
        table.add_column(title, justify="left" if left else "right", overflow="fold", min_width=6)
    for row in result_rows(ladder, state, job.amount):
        table.add_row(*(Text(cell, style="bold green" if row.won else "") for cell in row.cells))
    console.print(table)
    for line in (*reasons(state), *_places(job)):
        console.print(line, markup=False, soft_wrap=True)


def _places(job: Job) -> Sequence[str]:
    found = [f"recipe  {job.output / 'best.yaml'}", f"page    {job.output / PAGE}"]
    if (job.output / "final").exists():
        found.insert(0, f"model   {job.output / 'final'}")
    return found
