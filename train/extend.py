"""`shoestring extend`: more budget for a finished run, by its schedule's rule and never by a silent jump."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import name_of, newest, open_checkpoint
from ..recipes import BudgetConfig, load_recipe
from ..recipes.errors import UserError
from .headline import LIMITS, budget_text
from .legs import REWARM_PEAK, Leg, choose_rule, plain_legs, read_legs
from .rundir import RunDir, kept, write_json

_LIMITS = tuple(name for name in LIMITS if name != "price")


def extend_run(folder: Path, budget: Sequence[str], *, rewarm: float | None, started: float) -> int:
    """Add a leg to the finished run in `folder` and train it; returns the exit code of the training.

    budget: `1h`, `time=1h`, `tokens=2M`, ... counted from now. rewarm: peak of a re-warmed leg, as a share of
    the first. A leg that was cut short goes on with the same command.

    Raises UserError when the folder holds no finished run, or the budget is none.
    """
    from .run import train_recipe

    source = folder / "resolved.yaml"
    if not source.is_file():
        raise UserError(
            f"{folder} is no run directory: it has no resolved.yaml.  Runs lie under runs/ by default."
        )
    given = more_budget(source, budget)
    run_dir = RunDir(folder)
    with run_dir.lock():
        legs = read_legs(run_dir.legs)
        finished = run_dir.finished_legs()
        if finished < 1 + len(legs):
            if not legs or legs[-1].given != given:
                raise UserError(
                    f"{folder} has not finished its {'budget' if not legs else 'last extension'} yet.\n"
                    f"  Let it: shoestring train {folder / 'recipe.yaml'} output_dir={folder}\n"
                    f"  Or change the budget that it has: shoestring budget {folder} NEW"
                )
        else:
            legs.append(_next_leg(folder, given, rewarm))
            with kept(run_dir.summary) as text:
                summary = json.loads(text)
            write_json(folder / f"summary-{finished}.json", summary)
            run_dir.budget.unlink(missing_ok=True)  # it changed the budget that is spent
            write_json(run_dir.legs, plain_legs(legs))
            print(f"leg {len(legs) + 1}: {budget_text(given)}.  {legs[-1].why}")
    return train_recipe(str(source), [f"output_dir={folder}"], fresh=False, started=started)


def more_budget(source: Path, budget: Sequence[str]) -> BudgetConfig:
    """The budget of a leg: the limits in `budget` and no others; price and memory as in the recipe."""
    words = [word if "=" in word else f"time={word}" for word in budget]
    names = [word.split("=", 1)[0].removeprefix("budget.") for word in words]
    if not words:
        raise UserError(
            "--budget is missing: how much more?   For example --budget 1h, or --budget tokens=2M"
        )
    none = [f"budget.{name}=null" for name in _LIMITS if name not in names]
    new = [f"budget.{name}={word.split('=', 1)[1]}" for name, word in zip(names, words, strict=True)]
    return load_recipe(source, [*none, *new]).recipe.budget


def _next_leg(folder: Path, budget: BudgetConfig, rewarm: float | None) -> Leg:
    recipe = load_recipe(folder / "resolved.yaml").recipe
    last = newest(folder, print)
    if last is None:
        raise UserError(
            f"{folder} has no whole checkpoint to go on from.\n"
            f"  Train it again: shoestring train {folder}/recipe.yaml --fresh, with the larger budget"
        )
    state = last.json("trainer")["state"]
    before_decay = state.get("before_decay")
    rule, why = choose_rule(recipe.schedule, before_decay)
    peak = 1.0
    if rule == "rewarm":
        peak = REWARM_PEAK if rewarm is None else rewarm
        why += f" to {peak:g} of its first peak, over a new warm-up"
    elif rewarm is not None:
        raise UserError(f"--rewarm is for schedules that start anew.  Here {why}.  Leave --rewarm out")
    # The branch is opened now: a damaged one must not be found after the old summary is put aside.
    at_peak = rule == "wsd" and before_decay is not None
    source = open_checkpoint(folder / name_of(before_decay)).path.name if at_peak else last.path.name
    return Leg(
        budget=budget.model_dump(mode="json"),
        rule=rule,
        why=why,
        peak=peak,
        source=source,
        step=int(state["step"]),
        seconds=float(last.json("trainer")["clock"]["seconds"]),
        tokens=int(state["tokens"]),
    )
