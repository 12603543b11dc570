"""`shoestring budget RUN`: what is given, used and left; `shoestring budget RUN 40min`: another budget."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from ..recipes import BudgetConfig
from ..recipes.draft import COMMAND_LINE
from ..recipes.errors import UserError
from ..recipes.yaml_text import flow, parse, read_text
from ..schedules.limits import Limits
from .budget_file import BudgetFile, changed, put_into, read_budget, read_words
from .figures import count_text, duration_text, energy_text
from .legs import Leg, read_legs
from .rundir import RunDir, kept, write_text
from .tracking import read_jsonl

BAR = 24

Amounts = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Standing:
    """Where a run stands. given: its recipe's budget, or its present leg's; budget: with budget.yaml in it.
    limits, used: of the present leg.
    """

    run_dir: RunDir
    legs: list[Leg]
    given: BudgetConfig
    budget: BudgetConfig
    used: Amounts
    step: int
    progress: float
    finished: bool
    running: bool

    @property
    def limits(self) -> dict[str, float | int | None]:
        """What is given, by name."""
        return Limits.from_recipe(self.budget).amounts()


def show_budget(folder: Path, words: Sequence[str]) -> None:
    """Print the standing of the run in `folder`, or give it the budget in `words`.

    Raises UserError when the folder holds no run, the words are no budget, or the run is over.
    """
    if not (folder / "resolved.yaml").is_file():
        raise UserError(
            f"{folder} is no run directory: it has no resolved.yaml.  Runs lie under runs/ by default."
        )
    standing = read_standing(RunDir(folder))
    console = Console(highlight=False)
    if words:
        console.print(give(standing, words), markup=False, soft_wrap=True)
    else:
        console.print(headline(standing), markup=False, soft_wrap=True)
        console.print(table(standing))
        if standing.finished:
            console.print(f"Go on: shoestring extend {folder} --budget 10min", markup=False, soft_wrap=True)


def read_standing(run_dir: RunDir) -> Standing:
    """From the files of a run, whether it is going, stopped or finished."""
    legs = read_legs(run_dir.legs)
    given = legs[-1].given if legs else _recipe_budget(run_dir.resolved)
    budget = BudgetFile(run_dir.budget, given).poll() or given
    finished = run_dir.finished_legs() > len(legs)
    lines = read_jsonl(run_dir.metrics)
    last: dict[str, Any] = lines[-1] if lines else {}
    if finished:
        with kept(run_dir.summary) as text:
            summary = json.loads(text)
            used: Amounts = {name: amounts["used"] for name, amounts in summary["budget"].items()}
            last = {"step": summary["steps"], "progress": summary["final_progress"]}
    else:
        used = _used(last, budget)
    return Standing(
        run_dir=run_dir,
        legs=legs,
        given=given,
        budget=budget,
        used=_since(used, legs),
        step=int(last.get("step") or 0),
        progress=float(last.get("progress") or 0.0),
        finished=finished,
        running=_is_locked(run_dir.path / ".lock"),
    )


def give(standing: Standing, words: Sequence[str]) -> str:
    """Write budget.yaml, with the keys of an earlier one that `words` do not name; says what will happen."""
    folder, file = standing.run_dir.path, standing.run_dir.budget
    if standing.finished:
        raise UserError(
            f"{folder} has finished: its budget cannot change any more.\n"
            f"  Give it more: shoestring extend {folder} --budget {words[0]}"
        )
    values = read_words(words)
    earlier = _earlier(file)
    merged = {**earlier, **values}
    places = dict.fromkeys(earlier, str(file)) | dict.fromkeys(values, COMMAND_LINE)
    new = changed(standing.given, merged, places, shown=COMMAND_LINE)
    old_limits, new_limits = Limits.from_recipe(standing.budget), Limits.from_recipe(new)
    when = "at its next step" if standing.running else "when it is resumed"
    over = [
        name
        for name, limit in new_limits.amounts().items()
        if limit is not None and (standing.used.get(name) or 0) > limit
    ]
    if over and not standing.running:
        used = ", ".join(f"{name} {_text(name, standing.used[name], new)}" for name in over)
        raise UserError(
            f"{COMMAND_LINE}  {' '.join(words)}: the run in {folder} has used more than that ({used}), and "
            "it has stopped, so it could not go on.   Give more"
        )
    write_text(file, "".join(f"{key}: {flow(value)}\n" for key, value in merged.items()))
    lines = [f"wrote {file}: {old_limits.changes(new_limits).removeprefix('budget: ')}"]
    if over:
        lines.append(f"{', '.join(over)}: more than that is used already, so the run lands {when}")
    elif standing.progress >= 1.0:
        lines.append(
            f"The run takes it over {when}, but its schedule has reached its end: further steps run at its "
            f"floor.  Once it has landed: shoestring extend {folder} --budget {words[0]}"
        )
    else:
        lines.append(
            f"The run takes it over {when}: its rate goes on from {standing.progress:.0%} of the schedule "
            "and lands at the new end"
        )
    return "\n".join(lines)


def headline(standing: Standing) -> str:
    """Which run, and how far it is."""
    state = "finished" if standing.finished else "running" if standing.running else "stopped"
    return (
        f"{standing.run_dir.path}: {state}, step {standing.step:,}, {standing.progress:.0%} of the schedule"
    )


def table(standing: Standing) -> Table:
    """Given, used and left of each limit, with a bar."""
    found = Table("budget", "given", "used", "left", "", box=box.SIMPLE_HEAD)
    price = standing.budget.price
    for name, limit in standing.limits.items():
        used = standing.used.get(name)
        if limit is None and used is None:
            continue
        left = None if limit is None or used is None else max(0.0, limit - used)
        share = None if limit is None or used is None else min(1.0, used / limit)
        found.add_row(
            name,
            _text(name, limit, standing.budget),
            _text(name, used, standing.budget),
            _text(name, left, standing.budget),
            "" if share is None else ProgressBar(total=1.0, completed=share, width=BAR),
        )
    if price is not None:
        found.add_row("price", price.text, "", "", "")
    return found


def _text(name: str, value: float | int | None, budget: BudgetConfig) -> str:
    if value is None:
        return "–"
    match name:
        case "time":
            return duration_text(value)
        case "cost":
            money = budget.cost or budget.price
            return f"{value:.4g} {money.currency}" if money is not None else f"{value:.4g}"
        case "energy":
            return energy_text(value)
        case "epochs":
            return f"{value:.3g}"
    return count_text(value)


def _used(last: Mapping[str, Any], budget: BudgetConfig) -> Amounts:
    """By the last line of metrics.jsonl, as far as it tells."""
    return {
        "time": last.get("seconds", 0.0),
        "cost": last.get("cost", 0.0 if not last and budget.price is not None else None),
        "energy": last.get("joules"),
        "tokens": last.get("tokens", 0),
        "steps": last.get("step", 0),
        "epochs": last.get("epoch"),
    }


def _since(used: Amounts, legs: Sequence[Leg]) -> Amounts:
    """What the present leg used; None where it is not known what was used before it."""
    if not legs:
        return used
    began = {"time": legs[-1].seconds, "tokens": legs[-1].tokens, "steps": legs[-1].step}
    return {
        name: None if value is None or name not in began else max(0, value - began[name])
        for name, value in used.items()
    }


def _recipe_budget(resolved: Path) -> BudgetConfig:
    """Of resolved.yaml; its other sections may be those of another version."""
    values = parse(read_text(resolved, str(resolved)), str(resolved)).values
    budget = values.get("budget") if isinstance(values, dict) else None
    if not isinstance(budget, dict):
        raise UserError(f"{resolved}  has no budget: it is damaged.  Copy it back, or start with --fresh")
    return put_into(BudgetConfig(), budget, dict.fromkeys(budget, str(resolved)), shown=str(resolved))


def _earlier(file: Path) -> dict[str, Any]:
    """The keys of the file that is there; none where it is missing or was not understood."""
    try:
        return read_budget(file)[0]
    except UserError:
        return {}


def _is_locked(path: Path) -> bool:
    """Whether a process trains in the folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
