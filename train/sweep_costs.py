"""What a sweep's legs cost outside their training, guessed from a plan, then measured; and the refusal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..recipes.errors import BudgetError, in_columns
from ..recipes.quantities import Count, Seconds
from .figures import count_text, duration_text
from .sweep_plan import Ladder, Leg, Overheads, budget_for, make_ladder, whole_trial
from .sweep_state import LegDone

LEAST_STEPS = 10
"""To the first pause: after fewer, warm-up is hardly over and losses tell little."""
MOST_PLANS = 8
NOTHING = Overheads()


@dataclass(frozen=True)
class Figures:
    """Of one trial's plan. step: what a step takes, in the sweep's unit. costs: nothing for tokens and steps.

    step_seconds: for an estimate of the time that a budget in tokens or steps takes. eval_rows: measured at
    each pause.
    """

    step: float
    costs: Overheads
    step_seconds: float
    overheads: Overheads
    eval_rows: int


Planner = Callable[[float], Figures]
"""The figures of a trial that may use so much."""


def figures_of(plan: Mapping[str, Any], unit: str, *, start_up: float) -> Figures:
    """From plan.json's values; start_up: seconds of the process that made the plan."""
    ends, line = plan["reserve_guess"], plan["timeline"]
    measured = ends["eval"] + ends["samples"]
    first = start_up + line["load"] + measured + ends["report"]
    overheads = Overheads(first, first - measured, ends["eval"] + ends["save"], sum(ends.values()))
    step = {"time": plan["step_seconds"], "tokens": float(plan["batch_tokens"]), "steps": 1.0}[unit]
    costs = overheads if unit == "time" else NOTHING
    return Figures(step, costs, plan["step_seconds"], overheads, plan["eval_rows"])


def measured_costs(guess: Overheads, legs: Sequence[LegDone]) -> Overheads:
    """The mean of what finished legs took; a resumed start not seen yet keeps its distance to the first."""

    def mean(values: list[float], otherwise: float) -> float:
        return fmean(values) if values else otherwise

    whole = [leg for leg in legs if leg.start is not None and leg.end is not None]
    first = mean([leg.start or 0.0 for leg in whole if leg.rung == 0], guess.first)
    again = mean(
        [leg.start or 0.0 for leg in whole if leg.rung > 0], max(0.0, first - (guess.first - guess.again))
    )
    pause = mean([leg.end or 0.0 for leg in whole if leg.until < 1.0], guess.pause)
    return Overheads(first, again, pause, guess.landing)


def steps_to_first_pause(amount: float, ladder: Ladder, figures: Figures) -> float:
    """How many steps each trial makes before the first comparison when the sweep has `amount`."""
    legs = ladder.legs(0, ladder.counts[0])
    return legs[0].share * whole_trial(amount, legs, figures.costs) / figures.step


def fitting_figures(
    amount: float, ladder: Ladder, planner: Planner, *, unit: str, reduction: int, automatic: bool
) -> Figures:
    """The plan of one trial, when `amount` holds the whole ladder.

    automatic: the number of rungs was not given, so fewer may be proposed. Raises BudgetError, with what
    would do, when a trial would not make LEAST_STEPS steps to the first pause.
    """
    legs = ladder.legs(0, ladder.counts[0])
    planned = _plan(planner, amount, legs)
    if planned is not None and steps_to_first_pause(amount, ladder, planned) >= LEAST_STEPS:
        return planned
    # A larger budget may choose a larger batch: what is proposed is planned itself before it is said.
    enough, figures = amount, planned
    for _ in range(MOST_PLANS):
        if figures is None:
            enough *= 2.0
        else:
            enough = max(1.05 * budget_for(LEAST_STEPS * figures.step, legs, figures.costs), 1.1 * enough)
        figures = _plan(planner, enough, legs)
        if figures is not None and steps_to_first_pause(enough, ladder, figures) >= LEAST_STEPS:
            break
    if figures is None:
        planner(whole_trial(amount, legs, NOTHING))
        raise AssertionError("a plan that was refused is made")
    raise _too_small(amount, enough, ladder, planned or figures, unit, reduction, automatic)


def amount_text(value: float, unit: str) -> str:
    """`12 min 30 s`, `1.20 M tokens`, `600 steps`."""
    if unit == "time":
        return duration_text(value)
    return f"{count_text(value)} {unit}" if unit == "tokens" else f"{value:.0f} {unit}"


def option_text(value: float, unit: str) -> str:
    """What to type for `--budget`, rounded up."""
    if unit == "time":
        return f"--budget {Seconds.write(math.ceil(value / 10) * 10)}"
    digits = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return f"--budget {unit}={Count.write(math.ceil(value / digits) * digits)}"


def _plan(planner: Planner, amount: float, legs: Sequence[Leg]) -> Figures | None:
    """Of a trial with its share of `amount`; None when not even the plan fits that."""
    try:
        return planner(whole_trial(amount, legs, NOTHING))
    except BudgetError as error:
        if no_room(error):
            raise
        return None


def no_room(error: BudgetError) -> bool:
    """Whether a plan was refused for memory or disk: no larger budget helps."""
    return str(error).startswith("does not fit")


def _too_small(
    amount: float,
    enough: float,
    ladder: Ladder,
    figures: Figures,
    unit: str,
    reduction: int,
    automatic: bool,
) -> BudgetError:
    trials = ladder.counts[0]
    steps = max(0.0, steps_to_first_pause(amount, ladder, figures))
    lines = [
        f"{amount_text(amount, unit)} is too little for {trials} trials: {steps:.0f} steps each to the first "
        f"pause, at {ladder.pauses[0]:.1%} of a trial's budget; {LEAST_STEPS} are the least"
    ]
    if unit == "time":
        costs = figures.costs
        lines.append(
            f"a trial starts in about {costs.first:.0f} s and goes on in {costs.again:.0f} s, a pause takes "
            f"{costs.pause:.0f} s, a step {figures.step:.1f} s"
        )
    changes = [option_text(enough, unit)]
    fewer = _most_trials(amount, trials, reduction, figures)
    if fewer:
        changes.append(f"{fewer} trials instead of {trials}")
    rungs = _most_rungs(amount, trials, reduction, len(ladder.pauses), figures) if automatic else None
    if rungs:
        changes.append(f"--rungs {rungs}")
    lines.append(f"Give {', or '.join(changes)}")
    return BudgetError(in_columns([("--budget", "\n".join(lines))]))


def _most_trials(amount: float, trials: int, reduction: int, figures: Figures) -> int | None:
    for fewer in range(trials - 1, 1, -1):
        if steps_to_first_pause(amount, make_ladder(fewer, reduction), figures) >= LEAST_STEPS:
            return fewer
    return None


def _most_rungs(amount: float, trials: int, reduction: int, rungs: int, figures: Figures) -> int | None:
    for fewer in range(rungs - 1, 0, -1):
        if steps_to_first_pause(amount, make_ladder(trials, reduction, fewer), figures) >= LEAST_STEPS:
            return fewer
    return None
