"""Schedules as a recipe writes them: what is built, what is refused and how that reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from shoestring.recipes import (
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    MirrorCosineSchedule,
    OneCycleSchedule,
    Piece,
    PiecewiseSchedule,
    PolynomialSchedule,
    PowerSchedule,
    RexSchedule,
    SquareSchedule,
    UbaSchedule,
    UserError,
    WsdSchedule,
    WsdSSchedule,
    load_recipe,
)
from shoestring.recipes.schedules import ScheduleConfig
from shoestring.schedules import Clock, Limits, Schedule, StepPermit, build_schedule, decay_factor
from shoestring.schedules.profiles import linear

BASE = "model: m\ndata: d.jsonl\nbudget: 2h\n"
EVERY: list[ScheduleConfig] = [
    ConstantSchedule(),
    LinearSchedule(),
    CosineSchedule(),
    PolynomialSchedule(),
    RexSchedule(),
    UbaSchedule(),
    MirrorCosineSchedule(),
    SquareSchedule(),
    WsdSchedule(),
    WsdSSchedule(),
    OneCycleSchedule(),
    InverseSqrtSchedule(),
    PowerSchedule(),
    PiecewiseSchedule(pieces=[Piece(until=0.5, profile="constant"), Piece(until=1.0, profile="cosine")]),
]
LANDS = [config for config in EVERY if config.name not in ("constant", "inverse_sqrt", "onecycle")]


def load(tmp_path: Path, section: str) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE + section, encoding="utf-8")
    return load_recipe(path, env={})


def refusal(tmp_path: Path, section: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, section)
    return str(caught.value).partition("recipe.yaml")[2]


# --- what is built


@pytest.mark.parametrize(
    ("section", "points"),
    [
        ("schedule: uba\n", [1.0, 2 / 3, 0.0]),
        ("schedule: {name: uba, phi: 2}\n", [1.0, 0.5, 0.0]),
        ("schedule: mirror_cosine\n", [1.0, 0.5, 0.0]),
        ("schedule: square\n", [1.0, 0.75, 0.0]),
        ("schedule: wsd\n", [1.0, 1.0, 0.0]),
        ("schedule: {name: wsd, decay_fraction: 1}\n", [1.0, 1 - math.sqrt(0.5), 0.0]),
        ("schedule: {name: wsd, decay_fraction: 1, decay_type: linear, min_factor: 0.2}\n", [1.0, 0.6, 0.2]),
        ("schedule: {name: wsd, decay_fraction: 1, decay_type: cosine}\n", [1.0, 0.5, 0.0]),
        ("schedule: {name: wsd, decay_fraction: 1, decay_type: inverse}\n", [1.0, 2 / 11, 0.1]),
        (
            "schedule: {name: wsd, decay_fraction: 1, decay_type: exponential, decay_to: 0.25}\n",
            [1.0, 0.5, 0.25],
        ),
        ("schedule: {name: wsd_s, periods: 2}\n", [1.0, 0.0, 0.0]),
        ("schedule: {name: wsd_s, periods: [0.5, 1], decay_fraction: 0.1}\n", [1.0, 0.0, 0.0]),
        ("schedule: {name: wsd_s, periods: [0.25, 1]}\n", [1.0, 1.0, 0.0]),
        ("schedule: {name: onecycle, pct_start: 0.5}\n", [0.04, 1.0, 4e-6]),
        (
            "schedule: {name: onecycle, pct_start: 0.25, anneal_strategy: linear}\n",
            [0.04, (2 + 4e-6) / 3, 4e-6],
        ),
        ("schedule: {name: inverse_sqrt, timescale: 0.5}\n", [1.0, math.sqrt(0.5), math.sqrt(1 / 3)]),
        (
            "schedule: {name: inverse_sqrt, timescale: 0.5, decay_fraction: 0.2}\n",
            [1.0, math.sqrt(0.5), 0.0],
        ),
        ("schedule: {name: power, hold: 0.25, b: -1}\n", [1.0, 0.5, 0.0]),
        ("schedule: {name: power, hold: 0.25, b: -1, decay_fraction: 0}\n", [1.0, 0.5, 0.25]),
        (
            "schedule: {name: piecewise, pieces: [{until: 0.5, profile: constant}, {until: 1}]}\n",
            [1.0, 1.0, 0.0],
        ),
        (
            "schedule: {name: piecewise, pieces: [{until: 0.5, start: 0, end: 0.8}, {until: 1, end: 0.3}]}\n",
            [0.0, 0.8, 0.3],
        ),
    ],
)
def test_the_recipe_gives_the_curve(tmp_path: Path, section: str, points: list[float]) -> None:
    schedule = build_schedule(load(tmp_path, section).recipe.schedule)
    assert [schedule(x) for x in (0.0, 0.5, 1.0)] == pytest.approx(points, abs=1e-12)


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.name)
def test_past_either_end_nothing_moves(config: ScheduleConfig) -> None:
    schedule = build_schedule(config)
    assert schedule.name == config.name
    assert [schedule(x) for x in (1.0001, 1.5, 7.0)] == [schedule(1.0)] * 3
    assert schedule(-0.1) == schedule(0.0)
    values = [schedule(i / 500) for i in range(501)]
    assert min(values) >= 0.0
    assert max(values) <= 1.0


@pytest.mark.parametrize("config", LANDS, ids=lambda config: config.name)
@pytest.mark.parametrize("total", [2, 3, 17, 200])
def test_the_last_step_lands_and_the_floor_is_affine(config: ScheduleConfig, total: int) -> None:
    kept = {"warmup_steps": 0.0}  # two steps are too few to warm up in
    bare, floored = (build_schedule(config.model_copy(update={"min_factor": r, **kept})) for r in (0.0, 0.3))
    for schedule, floor in ((bare, 0.0), (floored, 0.3)):
        clock = Clock(Limits(steps=total), started=0.0, now=lambda: 0.0, warmup=schedule.warmup)
        while (permit := clock.plan_step(1)).go:
            last = schedule.factor(permit)
            clock.finish_step(0.0, 1)
        assert last == pytest.approx(floor, abs=1e-15)
    grid = [i / 100 for i in range(101)]
    assert [floored(x) for x in grid] == pytest.approx([0.3 + 0.7 * bare(x) for x in grid], abs=1e-15)


def test_where_wsd_leaves_the_peak() -> None:
    schedule = build_schedule(WsdSchedule(decay_fraction=0.25))
    assert schedule.leaves_peak_at == 0.75
    assert schedule(0.75) == 1.0 > schedule(0.7501)
    assert [config.name for config in EVERY if build_schedule(config).leaves_peak_at is not None] == ["wsd"]


def test_periods_end_at_shares_of_the_budget_whatever_the_warm_up() -> None:
    """A checkpoint at a quarter of the budget is annealed: the warm-up is part of the first period."""
    schedule = build_schedule(WsdSSchedule(warmup_steps=7.0, periods=4))
    clock = Clock(Limits(steps=100), started=0.0, now=lambda: 0.0, warmup=schedule.warmup)
    factors = []
    while (permit := clock.plan_step(1)).go:
        factors.append(schedule.factor(permit))
        clock.finish_step(0.0, 1)
    assert factors[:7] == pytest.approx([(k + 1) / 7 for k in range(7)])
    assert [factors[k] for k in (24, 49, 74, 99)] == pytest.approx([0.0] * 4, abs=1e-15)
    assert [factors[k] for k in (7, 25, 50, 75)] == [1.0] * 4


def test_a_run_of_one_step_is_not_annealed_away() -> None:
    assert (
        Schedule("any", linear, whole_budget=True).factor(StepPermit(True, 1.0, 1.0, 0.0, place=1.0)) == 1.0
    )


# --- weight decay


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.0]),
        ("cosine", [1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.0]),
    ],
)
def test_weight_decay_through_the_budget(tmp_path: Path, kind: str, expected: list[float]) -> None:
    config = load(tmp_path, f"schedule: {{name: wsd, weight_decay: {kind}}}\n").recipe.schedule
    assert [decay_factor(config, x) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected, abs=1e-15)
    assert decay_factor(config, 1.5) == decay_factor(config, 1.0)
    assert decay_factor(config, -1.0) == 1.0


def test_weight_decay_stays_unless_told_otherwise() -> None:
    assert [decay_factor(config, 0.9) for config in EVERY] == [1.0] * len(EVERY)


# --- what is refused


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "schedule: {name: uba, phi: 0}\n",
            ":4  schedule.phi is 0; allowed: a number above 0 and at most 1000000.0",
        ),
        (
            "schedule: {name: onecycle, warmup_steps: 0.1}\n",
            ":4  schedule.warmup_steps: 0.1 is a second rise, and onecycle has its own, of "
            "schedule.pct_start.   Leave schedule.warmup_steps out",
        ),
        (
            "schedule: {name: onecycle, min_factor: 0.1}\n",
            ":4  schedule.min_factor is not a key of onecycle; linear, cosine, polynomial and 9 others "
            "have it.",
        ),
        (
            "schedule: {name: wsd, decay_to: 0.2}\n",
            ":4  schedule.decay_to: 0.2 is where a leg that never reaches 0 ends, and "
            "schedule.decay_type=1-sqrt ends at 0.   Leave it out for schedule.min_factor=0.2, or set "
            "schedule.decay_type=exponential",
        ),
        (
            "schedule: {name: wsd_s, periods: [0.6, 0.3]}\n",
            ":4  schedule.periods: [0.6, 0.3] must rise and end at 1: where each period ends, as a share "
            "of the budget.   For example [0.3, 0.6, 1.0]",
        ),
        (
            "schedule: {name: wsd_s, periods: 0}\n",
            ":4  schedule.periods is 0; allowed: a whole number of at least 1, or rising shares that end "
            "at 1",
        ),
        (
            "schedule: piecewise\n",
            ":4  schedule.pieces is missing.   Add pieces",
        ),
        (
            "schedule: {name: piecewise, pieces: [{until: 0.5}, {until: 0.4}]}\n",
            ":4  schedule.pieces: until is [0.5, 0.4], and must rise from piece to piece and end at 1.   "
            "For example [0.4, 0.5, 1.0]",
        ),
        (
            "schedule: {name: piecewise, pieces: [{until: 1, profile: constant, start: 0.5, end: 0.1}]}\n",
            ":4  schedule.pieces.0.end: 0.1 is not where this constant piece begins, and it ends there.   "
            "Leave end out, or set profile: linear",
        ),
    ],
)
def test_a_mistake_says_what_to_type(tmp_path: Path, section: str, message: str) -> None:
    assert refusal(tmp_path, section) == message


def test_two_mistakes_are_both_shown(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "schedule: {name: onecycle, warmup_steps: 5}\ntrain: {seed: -1}\n")
    assert "schedule.warmup_steps: 5 is a second rise" in lines
    assert "train.seed is -1" in lines


def test_a_resolved_recipe_loads_back(tmp_path: Path) -> None:
    for section in (
        "schedule: {name: wsd_s, periods: [0.5, 1], decay_type: inverse, decay_to: 0.05}\n",
        "schedule: {name: piecewise, pieces: [{until: 0.5, profile: constant}, {until: 1, profile: uba}]}\n",
        "schedule: onecycle\n",
        "schedule: wsd\n",
    ):
        first = load(tmp_path, section)
        again = tmp_path / "resolved.yaml"
        again.write_text(first.to_yaml(), encoding="utf-8")
        assert load_recipe(again, env={}).recipe == first.recipe
