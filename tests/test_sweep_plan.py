"""The arithmetic of a sweep: rungs and survivors, what a trial gets, what it costs, and refusals."""

from __future__ import annotations

import itertools
import math

import pytest
from shoestring.recipes.errors import BudgetError, UserError
from shoestring.train.sweep_costs import (
    LEAST_STEPS,
    NOTHING,
    Figures,
    figures_of,
    fitting_figures,
    measured_costs,
    option_text,
    steps_to_first_pause,
)
from shoestring.train.sweep_plan import (
    Ladder,
    Overheads,
    budget_for,
    fixed_amount,
    grant,
    make_ladder,
    trials_worth,
    whole_trial,
)
from shoestring.train.sweep_state import LegDone

COSTS = Overheads(first=8.0, again=5.0, pause=1.5, landing=4.0)


@pytest.mark.parametrize(
    ("trials", "reduction", "rungs", "pauses", "counts"),
    [
        (9, 3, None, (1 / 9, 1 / 3), (9, 3, 1)),
        (6, 3, None, (1 / 9, 1 / 3), (6, 2, 1)),
        (10, 3, None, (1 / 27, 1 / 9, 1 / 3), (10, 4, 2, 1)),
        (2, 3, None, (1 / 3,), (2, 1)),
        (8, 2, None, (1 / 8, 1 / 4, 1 / 2), (8, 4, 2, 1)),
        (9, 3, 1, (1 / 3,), (9, 1)),
        (27, 3, 2, (1 / 9, 1 / 3), (27, 9, 1)),
    ],
)
def test_rungs_and_survivors(trials, reduction, rungs, pauses, counts) -> None:
    ladder = make_ladder(trials, reduction, rungs)
    assert ladder.pauses == pauses
    assert ladder.counts == counts


@pytest.mark.parametrize(("trials", "reduction"), [*itertools.product(range(2, 60), (2, 3, 4, 7))])
def test_survivors_by_counting(trials: int, reduction: int) -> None:
    """After each pause one in `reduction` goes on, rounded up, until one is left."""
    kept, expected = trials, [trials]
    while kept > 1:
        kept = sum(1 for place in range(kept) if place % reduction == 0)
        expected.append(kept)
    ladder = make_ladder(trials, reduction)
    assert list(ladder.counts) == expected
    assert len(ladder.pauses) == len(expected) - 1
    assert all(b == pytest.approx(reduction * a) for a, b in itertools.pairwise((*ladder.pauses, 1.0)))


@pytest.mark.parametrize("rungs", [0, 3, 99])
def test_more_rungs_than_there_are_survivors_for(rungs: int) -> None:
    with pytest.raises(UserError, match="allowed: 1 to 2, or auto"):
        make_ladder(9, 3, rungs)


def spent_by_hand(ladder: Ladder, whole: float, costs: Overheads) -> float:
    """Every trial's every leg, one by one, from the equation in the module's docstring."""
    total, marks = 0.0, [0.0, *ladder.pauses, 1.0]
    for leg, count in enumerate(ladder.counts):
        for _ in range(count):
            total += costs.first if leg == 0 else costs.again
            total += (marks[leg + 1] - marks[leg]) * whole
            total += costs.landing if leg == len(ladder.counts) - 1 else costs.pause
    return total


@pytest.mark.parametrize("costs", [COSTS, NOTHING])
@pytest.mark.parametrize(
    ("trials", "reduction", "rungs"), [(9, 3, None), (6, 3, 1), (16, 2, 3), (5, 4, None)]
)
def test_legs_and_overheads_use_up_the_budget(trials, reduction, rungs, costs) -> None:
    ladder = make_ladder(trials, reduction, rungs)
    legs = ladder.legs(0, trials)
    whole = whole_trial(3600.0, legs, costs)
    assert spent_by_hand(ladder, whole, costs) == pytest.approx(3600.0, abs=1e-9)
    assert budget_for(whole * legs[0].share, legs, costs) == pytest.approx(3600.0)
    assert fixed_amount(legs, costs) == pytest.approx(spent_by_hand(ladder, 0.0, costs))


def test_a_trial_is_given_what_would_take_it_to_its_end() -> None:
    ladder = make_ladder(9, 3)
    legs = ladder.legs(1, 3)
    whole = whole_trial(1000.0, legs, COSTS)
    # 3 trials from 1/9 to 1/3, 1 from 1/3 to 1; four resumed starts, three pauses, one landing
    assert whole == pytest.approx((1000.0 - 4 * 5.0 - 3 * 1.5 - 4.0) / (3 * 2 / 9 + 2 / 3))
    assert grant(1000.0, legs, COSTS, ladder) == pytest.approx(5.0 + 8 / 9 * whole + 4.0)


def test_nine_trials_cost_two_and_a_third_whole_ones() -> None:
    assert trials_worth(make_ladder(9, 3).legs(0, 9)) == pytest.approx(7 / 3)


@pytest.mark.parametrize(
    ("rung", "alive", "expected"),
    [
        (0, 9, [(9, 1 / 9), (3, 2 / 9), (1, 2 / 3)]),
        (0, 2, [(2, 1 / 9), (2, 2 / 9), (1, 2 / 3)]),
        (1, 2, [(2, 2 / 9), (1, 2 / 3)]),
        (1, 1, [(1, 8 / 9)]),
        (2, 1, [(1, 2 / 3)]),
    ],
)
def test_what_is_left_to_run_when_trials_failed(rung, alive, expected) -> None:
    legs = make_ladder(9, 3).legs(rung, alive)
    assert [(leg.count, pytest.approx(leg.share)) for leg in legs] == expected
    assert legs[-1].until == 1.0


PLAN = {
    "reserve_guess": {"eval": 2.0, "samples": 3.0, "save": 0.5, "export": 1.0, "report": 0.25},
    "timeline": {"load": 4.0, "training": 50.0},
    "step_seconds": 0.7,
    "batch_tokens": 512,
    "eval_rows": 20,
}


def test_figures_of_a_plan() -> None:
    figures = figures_of(PLAN, "time", start_up=6.0)
    assert figures.costs == Overheads(first=15.25, again=10.25, pause=2.5, landing=6.75)
    assert (figures.step, figures.eval_rows) == (0.7, 20)
    assert figures_of(PLAN, "tokens", start_up=6.0).costs == NOTHING
    assert figures_of(PLAN, "tokens", start_up=6.0).step == 512
    assert figures_of(PLAN, "steps", start_up=6.0).step == 1


def leg(rung: int, start: float | None, end: float | None, until: float = 0.5) -> LegDone:
    return LegDone(rung, until, until, 1.0, 0, 0, 0, 0, 0, start, end)


def test_measured_overheads_take_the_place_of_guesses() -> None:
    guess = Overheads(first=10.0, again=7.0, pause=2.0, landing=5.0)
    assert measured_costs(guess, []) == guess
    assert measured_costs(guess, [leg(0, 20.0, 3.0), leg(0, 22.0, 5.0), leg(0, None, None)]) == Overheads(
        21.0, 18.0, 4.0, 5.0
    )
    done = [leg(0, 20.0, 3.0), leg(1, 12.0, 5.0), leg(2, 14.0, 99.0, until=1.0)]
    assert measured_costs(guess, done) == Overheads(20.0, 13.0, 4.0, 5.0)


def planner(step: float, costs: Overheads = NOTHING, least: float = 0.0):
    """A plan whose step grows with the root of the budget, and that refuses budgets below `least`."""

    def plan(amount: float) -> Figures:
        if amount < least:
            raise BudgetError("budget.time  too short")
        return Figures(step * math.sqrt(amount / 1000.0), costs, 0.5, costs, 10)

    return plan


def refusal(amount: float, plan, unit: str = "time", automatic: bool = True) -> str:
    with pytest.raises(BudgetError) as caught:
        fitting_figures(amount, make_ladder(9, 3), plan, unit=unit, reduction=3, automatic=automatic)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_a_budget_that_holds_the_rungs_is_planned_once() -> None:
    asked: list[float] = []

    def plan(amount: float) -> Figures:
        asked.append(amount)
        return planner(1.0)(amount)

    fitting_figures(700.0, make_ladder(9, 3), plan, unit="time", reduction=3, automatic=True)
    assert asked == [pytest.approx(300.0)]


@pytest.mark.parametrize(("least", "costs"), [(0.0, NOTHING), (0.0, COSTS), (500.0, COSTS)])
def test_the_proposal_is_enough(least: float, costs: Overheads) -> None:
    plan = planner(4.0, costs, least)
    said = refusal(60.0, plan)
    proposed = float(said.split("--budget ")[-1].split("s")[0])
    assert fitting_figures(proposed, make_ladder(9, 3), plan, unit="time", reduction=3, automatic=True)


def test_the_refusal_proposes_fewer_trials_and_fewer_rungs() -> None:
    plan = planner(7.7)
    said = refusal(400.0, plan)
    figures = plan(400.0 / (7 / 3))
    assert "too little for 9 trials" in said
    most = max(
        n for n in range(2, 9) if steps_to_first_pause(400.0, make_ladder(n, 3), figures) >= LEAST_STEPS
    )
    assert f"{most} trials instead of 9" in said
    assert "--rungs 1" in said
    assert "--rungs" not in refusal(400.0, plan, automatic=False)


def test_what_a_larger_budget_cannot_mend_is_passed_on() -> None:
    def no_memory(amount: float) -> Figures:
        raise BudgetError("does not fit  needs 9 GB")

    def never(amount: float) -> Figures:
        raise BudgetError("budget.time  never enough")

    assert refusal(60.0, no_memory) == "does not fit  needs 9 GB"
    assert refusal(60.0, never) == "budget.time  never enough"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (61.0, "time", "--budget 70s"),
        (3600.0, "time", "--budget 3600s"),
        (123_456, "tokens", "--budget tokens=130000"),
        (191, "steps", "--budget steps=200"),
    ],
)
def test_proposals_are_round(value: float, unit: str, text: str) -> None:
    assert option_text(value, unit) == text
