"""Profiles against closed forms and the schedulers of torch and transformers; warm-up; schedules by steps."""

import itertools
import math
from functools import partial

import pytest
import torch
from shoestring.recipes import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    PolynomialSchedule,
    RexSchedule,
)
from shoestring.schedules import Clock, Limits, Schedule, StepPermit, Warmup, build_schedule
from shoestring.schedules.profiles import constant, cosine, linear, polynomial, rex
from transformers import get_scheduler

DECAYS = {
    "linear": linear,
    "cosine": cosine,
    "polynomial 2": partial(polynomial, power=2.0),
    "polynomial 0.5": partial(polynomial, power=0.5),
    "rex": rex,
    "rex 0.9": partial(rex, d=0.9),
    "rex 0": partial(rex, d=0.0),
}


@pytest.mark.parametrize("profile", DECAYS.values(), ids=DECAYS.keys())
def test_a_decay_starts_at_one_ends_at_zero_and_never_rises(profile):
    values = [profile(i / 1000) for i in range(1001)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.0, abs=1e-16)
    assert all(a >= b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("profile", "area"),
    [
        (constant, 1.0),
        (linear, 0.5),
        (cosine, 0.5),
        (partial(polynomial, power=2.0), 1 / 3),
        (partial(polynomial, power=0.5), 2 / 3),
        (rex, 2 * (1 - math.log(2))),
        (partial(rex, d=0.9), 1 / 0.9 + 0.1 / 0.81 * math.log(0.1)),
    ],
    ids=["constant", "linear", "cosine", "polynomial 2", "polynomial 0.5", "rex", "rex 0.9"],
)
def test_the_mean_of_a_profile_is_its_closed_form(profile, area):
    n = 200_000
    assert sum(profile((i + 0.5) / n) for i in range(n)) / n == pytest.approx(area, abs=1e-6)


@pytest.mark.parametrize(
    ("profile", "quarters"),
    [
        (rex, [0.8571, 0.6667, 0.4, 0.1818]),
        (partial(rex, d=0.9), [0.9677, 0.9091, 0.7692, 0.5263]),
        (cosine, [0.8536, 0.5, 0.1464, 0.0245]),
        (partial(polynomial, power=2.0), [0.5625, 0.25, 0.0625, 0.01]),
    ],
    ids=["rex", "rex 0.9", "cosine", "polynomial 2"],
)
def test_values_at_fixed_points(profile, quarters):
    assert [profile(x) for x in (0.25, 0.5, 0.75, 0.9)] == pytest.approx(quarters, abs=5e-5)


def rates_of(scheduler_of, count):
    """The factors a peer's scheduler gives after 0, 1, ... count calls of step()."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_of(optimizer)
    factors = [optimizer.param_groups[0]["lr"]]
    for _ in range(count):
        optimizer.step()
        scheduler.step()
        factors.append(optimizer.param_groups[0]["lr"])
    return factors


@pytest.mark.parametrize("total", [1, 7, 100])
@pytest.mark.parametrize(
    ("profile", "scheduler"),
    [
        (linear, lambda o, t: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, t)),
        (cosine, lambda o, t: torch.optim.lr_scheduler.CosineAnnealingLR(o, t)),
        (polynomial, lambda o, t: torch.optim.lr_scheduler.PolynomialLR(o, t, 1.0)),
        (
            partial(polynomial, power=3.0),
            lambda o, t: torch.optim.lr_scheduler.PolynomialLR(o, t, 3.0),
        ),
        (
            Schedule("floor", cosine, min_factor=0.1),
            lambda o, t: torch.optim.lr_scheduler.CosineAnnealingLR(o, t, eta_min=0.1),
        ),
    ],
    ids=["linear", "cosine", "polynomial 1", "polynomial 3", "cosine with floor"],
)
def test_profiles_are_those_of_torch(profile, scheduler, total):
    theirs = rates_of(lambda o: scheduler(o, total), total)
    assert [profile(i / total) for i in range(total + 1)] == pytest.approx(theirs, abs=1e-12)


def by_steps(schedule, total):
    """Factors of a run of `total` steps, as the loop takes them."""
    clock = Clock(Limits(steps=total), started=0.0, now=lambda: 0.0, warmup=schedule.warmup)
    factors = []
    while (permit := clock.plan_step(tokens=100)).go:
        factors.append(schedule.factor(permit))
        clock.finish_step(0.0, 100)
    assert clock.stop_reason == "steps"
    return factors


@pytest.mark.parametrize("warmup", [0, 1, 5, 30])
@pytest.mark.parametrize(
    ("config", "name", "options"),
    [
        (LinearSchedule, "linear", {}),
        (CosineSchedule, "cosine", {}),
        (ConstantSchedule, "constant_with_warmup", {}),
        (partial(PolynomialSchedule, power=2.0), "polynomial", {"power": 2.0, "lr_end": 0.0}),
        (partial(PolynomialSchedule, power=1.5, min_factor=0.2), "polynomial", {"power": 1.5, "lr_end": 0.2}),
        (partial(CosineSchedule, min_factor=0.1), "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ],
    ids=["linear", "cosine", "constant", "polynomial", "polynomial with floor", "cosine with floor"],
)
def test_a_steps_budget_is_the_sequence_of_transformers_one_call_earlier(config, name, options, warmup):
    total = 100
    theirs = rates_of(
        lambda o: get_scheduler(name, o, warmup, total, scheduler_specific_kwargs=options), total
    )
    ours = by_steps(build_schedule(config(warmup_steps=float(warmup))), total)
    assert ours == pytest.approx(theirs[1:], abs=1e-12)


def test_a_share_of_warm_up_is_that_many_steps_when_they_are_enough():
    share = by_steps(build_schedule(LinearSchedule(warmup_steps=0.03)), 1000)
    steps = by_steps(build_schedule(LinearSchedule(warmup_steps=30.0)), 1000)
    assert share == pytest.approx(steps, abs=1e-12)


def test_a_share_of_warm_up_takes_ten_steps_at_least():
    factors = by_steps(build_schedule(ConstantSchedule(warmup_steps=0.03)), 100)
    assert factors[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


def test_in_a_short_run_the_ten_steps_become_a_tenth_but_no_step_rises_by_more_than_a_third():
    assert by_steps(build_schedule(ConstantSchedule()), 60)[:7] == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1]
    )
    assert by_steps(build_schedule(ConstantSchedule()), 12)[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("total", [1, 2, 3, 10, 40, 1000])
@pytest.mark.parametrize("profile", [linear, cosine, rex], ids=lambda p: p.__name__)
def test_whatever_the_number_of_steps_the_peak_is_reached_and_the_last_step_is_annealed(profile, total):
    factors = by_steps(Schedule("any", profile, warmup=Warmup(share=0.03)), total)
    assert len(factors) == total
    assert factors[0] > 0
    if total >= 10:
        assert max(factors) == 1.0
    if total > 1:
        assert factors[-1] == pytest.approx(0.0, abs=1e-15)
    rises = [b - a for a, b in itertools.pairwise([0.0, *factors])]
    assert max(rises) <= 1 / 3 + 1e-12
    top = factors.index(max(factors))
    assert all(a >= b for a, b in itertools.pairwise(factors[top:]))


def test_a_run_of_one_step_without_warm_up_trains_at_the_peak():
    assert by_steps(Schedule("linear", linear), 1) == [1.0]


@pytest.mark.parametrize("progress", [0.0, 0.01, 0.5, 1.0])
def test_warm_up_never_jumps_when_progress_does(progress):
    """A stall may move progress by any amount between two steps."""
    level = 0.0
    for step in range(3):
        after = Warmup(share=0.03).level(progress, step, level)
        assert level < after <= level + 1 / 3
        level = after


def test_without_any_estimate_the_first_step_has_a_rate():
    assert Warmup(share=0.03).level(0.0, 0, 0.0) == pytest.approx(0.1)


def test_a_warm_up_in_steps_is_taken_at_its_word():
    levels = [Warmup(steps=2).level(0.5, step, 0.0) for step in range(3)]
    assert levels == [0.5, 1.0, 1.0]


def test_the_factor_clamps_progress_and_keeps_the_floor():
    schedule = Schedule("cosine", cosine, min_factor=0.1)
    assert schedule(-0.5) == 1.0
    assert schedule(1.5) == pytest.approx(0.1)
    assert schedule(0.5) == pytest.approx(0.55)
    assert schedule.factor(StepPermit(True, 0.5, 0.5, 0.5)) == pytest.approx(0.275)


@pytest.mark.parametrize(
    ("config", "half"),
    [
        (ConstantSchedule(), 1.0),
        (LinearSchedule(min_factor=0.2), 0.6),
        (CosineSchedule(), 0.5),
        (PolynomialSchedule(power=2.0), 0.25),
        (RexSchedule(), 2 / 3),
        (RexSchedule(d=0.9), 0.5 / 0.55),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_recipe_names_the_profile(config, half):
    schedule = build_schedule(config)
    assert schedule.name == config.name
    assert schedule(0.5) == pytest.approx(half, abs=1e-12)
    assert schedule.warmup == Warmup(share=0.03)


def test_warm_up_from_the_recipe():
    assert Warmup.from_recipe(0.0) == Warmup()
    assert Warmup.from_recipe(0.1) == Warmup(share=0.1)
    assert Warmup.from_recipe(20.0) == Warmup(steps=20)
