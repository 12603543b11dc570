"""How many held-out rows are measured, so that all evaluations together stay a small part of the budget."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from ..recipes import Recipe
from . import defaults
from .facts import DataFacts
from .seconds import occasions

# Below this the loss of a few rows says little.
_LEAST_ROWS = 16
# Guess of the steps of a run, where evaluations are due every so many steps and steps are not known yet.
_STEPS_GUESS = 300


@dataclass(frozen=True)
class EvalRows:
    """Rows measured at the start and the end, and in between, with the seconds of one measurement."""

    ends: int
    between: int
    ends_seconds: float
    between_seconds: float
    reason: str


def choose_eval_rows(
    recipe: Recipe, data: DataFacts, *, expected_seconds: float, seconds_per_token: float
) -> EvalRows:
    """All held-out rows, unless evaluations would take more than EVAL_SHARE of a limited time (of a short one
    SHORT_EVAL_SHARE).

    `expected_seconds` is inf where neither time nor cost is limited: then all rows are measured, because what
    is measured must not depend on the speed of the moment.
    """
    rows = data.eval_rows
    if rows == 0:
        return EvalRows(0, 0, 0.0, 0.0, "no rows are held out")
    one = data.eval_tokens / rows * seconds_per_token

    given = recipe.eval.rows
    between = rows if given is None else min(given, rows)
    times = occasions(recipe.eval.every, seconds=expected_seconds, steps=recipe.budget.steps or _STEPS_GUESS)
    short = expected_seconds < defaults.SHORT_SECONDS
    share = defaults.SHORT_EVAL_SHARE if short else defaults.EVAL_SHARE
    allowed = share * expected_seconds
    wanted = (2 * rows + times * between) * one
    reason = "all held-out rows" if given is None else f"eval.rows={given} between the ends"
    ends = rows
    if expected_seconds < inf and wanted > allowed:
        least = min(_LEAST_ROWS, rows)
        ends = max(least, int(rows * allowed / wanted))
        between = max(min(least, between), min(between, ends))
        reason = (
            f"{ends} of {rows} held-out rows: all would take {wanted / expected_seconds:.0%} of the run, "
            f"more than {share:.0%}"
        )
    return EvalRows(ends, between, ends * one, between * one, reason)
