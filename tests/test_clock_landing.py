"""Landing: simulated runs with noise, stalls, wrong guesses and other disturbances end on time."""

import itertools
import math
from functools import partial

import pytest
from clock_world import WORK, World, simulate
from shoestring.recipes import Every
from shoestring.schedules import Limits
from shoestring.schedules.profiles import cosine, linear, rex

SEEDS = 40


def uba(x, phi=1.0):
    """As in the reference: 1 / (1 + phi / 2 tan^2(pi x / 2))."""
    return 0.0 if x >= 1.0 else 1.0 / (1.0 + 0.5 * phi * math.tan(0.5 * math.pi * x) ** 2)


def wsd(x, decay=0.2):
    """Hold, then 1 - sqrt."""
    return 1.0 if x <= 1.0 - decay else 1.0 - math.sqrt((x - 1.0 + decay) / decay)


def factor_of(kind, numbers, factor):
    """The cost of some pieces of work of a kind, numbered from one."""
    return lambda at, n: factor if at == kind and n in numbers else 1.0


def growing(kind, factor):
    return lambda at, n: factor ** (n - 1) if at == kind else 1.0


def slow_between(start, end, factor):
    return lambda at: factor if start < at < end else 1.0


LONG_WORK = {"eval": 40.0, "save": 30.0}
SHORT_WORK = {"eval": 0.3, "samples": 0.2, "save": 0.05, "export": 0.3, "report": 0.1}
FIVE = partial(World, 300, 2)
WORLDS = {
    "3 min, 2 s steps": World(180, 2),
    "3 min, 3 s steps": World(180, 3),
    "3 min, 4 s steps": World(180, 4),
    "3 min, 4 s steps, rex": World(180, 4, profile=rex),
    "3 min, 3 s steps, uba": World(180, 3, profile=uba),
    "3 min, 3 s steps, wsd": World(180, 3, profile=wsd),
    "3 min, sizes differ": World(180, 3, size_noise=0.2),
    "3 min, slow first step": World(180, 3, first_step=20),
    "3 min, stall": World(180, 2, stall=20),
    "3 min, evaluation takes twice the guess": World(180, 3, guessed={"eval": 3.0}),
    "3 min, slower steps": World(180, 2, slowdown=1.3),
    "3 min, all slower half way": World(180, 2, pace=slow_between(90, 999, 1.3)),
    "3 min, suspended": World(180, 2, stops=((100, 20),)),
    "3 min, suspended in an evaluation": World(180, 2, stops=((118, 20),)),
    "6 min": World(360, 3, profile=cosine),
    "a first step that compiles": FIVE(first_step=90, speed_guess=0.002),
    "other programs at the start": World(240, 2, pace=slow_between(-1, 85, 2.0)),
    "other programs at the first measurements": World(240, 2, pace=slow_between(55, 100, 3.0)),
    "other programs in the middle": World(240, 2, pace=slow_between(100, 150, 2.0)),
    "evaluations that grow": FIVE(cost_of=growing("eval", 1.2)),
    "evaluations that shrink": FIVE(cost_of=growing("eval", 0.8)),
    "saves that grow": FIVE(cost_of=growing("save", 1.3)),
    "an evaluation that stalls": FIVE(cost_of=factor_of("eval", [2], 4.0)),
    "the last evaluation stalls": FIVE(cost_of=factor_of("eval", [4], 4.0)),
    "the first evaluation stalls": FIVE(cost_of=factor_of("eval", [1], 4.0)),
    "resumed on a machine half as fast": FIVE(resume=(150, 2.0)),
    "resumed on a machine twice as fast": FIVE(resume=(150, 0.5)),
    "a budget that is cut": World(600, 2, changes=((200, Limits(seconds=400.0)),)),
    "a budget that is raised": FIVE(changes=((200, Limits(seconds=600.0)),)),
    "a budget that is cut and raised": FIVE(
        changes=((120, Limits(seconds=200.0)), (150, Limits(seconds=320.0)))
    ),
    "money": World(180, 2, limits=Limits(cost=0.3, price_per_hour=6.0)),
    "money whose price doubles": FIVE(
        limits=Limits(cost=0.5, price_per_hour=6.0), changes=((150, Limits(cost=0.5, price_per_hour=12.0)),)
    ),
    "two stages": FIVE(stages=(0.2,)),
    "1 hour, as in the reference": World(
        3600, 2, 30, 90, 1.3, work=LONG_WORK, events=((Every(share=0.1), "eval"),), speed_guess=0.002
    ),
    "an evaluation that can be made smaller": FIVE(least=0.3),
    "the same, twice as slow from half way": FIVE(least=0.3, pace=slow_between(150, 999, 2.0)),
    "the same, three times as slow half way": FIVE(least=0.3, pace=slow_between(150, 200, 3.0)),
    "thousands of small steps": World(60, 0.02, startup=8, step_noise=0.3, work=SHORT_WORK),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_a_budget_is_landed_on(world):
    heavy = world.budget > 1000 or world.step < 0.1
    landings = [simulate(world, seed) for seed in range(4 if heavy else SEEDS)]
    limits = landings[0].clock.limits
    budget = limits.seconds or limits.cost / limits.price_per_hour * 3600
    longest = world.step * world.slowdown * math.exp(4 * world.size_noise)
    longest *= world.resume[1] if world.resume else 1.0
    assert max(landing.over for landing in landings) <= max(0.01 * budget, 1.0)
    assert max(landing.unused for landing in landings) <= longest + 0.03 * budget
    for landing in landings:
        assert landing.factor <= 0.02
        assert landing.progress >= 0.98
        progress = [x for _, x, _ in landing.trace]
        assert progress == sorted(progress)
    # Time at rate zero is time wasted: only the last step, and one or two that fit unexpectedly.
    idle = [sum(factor == 0.0 for factor in landing.factors) for landing in landings]
    assert max(idle) <= 2 + len(world.stages)


@pytest.mark.parametrize("name", ["3 min, 2 s steps", "3 min, 3 s steps", "6 min", "a budget that is raised"])
def test_on_average_little_is_left(name):
    landings = [simulate(WORLDS[name], seed) for seed in range(SEEDS)]
    mean = sum(landing.unused / landing.clock.limits.seconds for landing in landings) / len(landings)
    assert 0.0 <= mean <= 0.02
    assert all(max(landing.factors) == 1.0 for landing in landings)


def test_the_mean_rate_of_a_run_is_the_area_of_its_profile():
    for profile, area in ((linear, 0.5), (rex, 2 * (1 - math.log(2))), (uba, 1 / (1 + math.sqrt(0.5)))):
        factors = simulate(World(900, 2, profile=profile, work={"save": 5.0}), 0).factors
        assert sum(factors) / len(factors) == pytest.approx(area, abs=0.03)


@pytest.mark.parametrize(
    "name",
    ["3 min, suspended", "a budget that is cut", "a budget that is raised", "an evaluation that stalls"],
)
def test_no_disturbance_makes_the_rate_jump(name):
    """No fall is much larger than the ones beside it: the slope changes, the rate does not jump."""
    for seed in range(10):
        factors = simulate(WORLDS[name], seed).factors
        falls = [a - b for a, b in itertools.pairwise(factors[factors.index(1.0) : -4])]
        assert min(falls) >= 0.0
        for before, fall, after in zip(falls, falls[1:], falls[2:], strict=False):
            assert fall <= 2.0 * max(before, after)


def test_the_rate_falls_in_small_steps_after_the_warm_up():
    factors = simulate(World(900, 2, events=((Every(steps=50), "eval"),)), 1).factors
    top = factors.index(1.0)
    assert top >= 9
    drops = [a - b for a, b in itertools.pairwise(factors[top:])]
    assert min(drops) >= 0.0
    assert max(drops) <= 0.03


def test_what_stalls_before_the_first_step_and_is_never_measured_again_is_kept_free():
    """The one weakness: 12 s of sample answers instead of 3, so 9 s are left at the end."""
    world = FIVE(cost_of=factor_of("samples", [1], 4.0))
    for seed in range(20):
        landing = simulate(world, seed)
        assert landing.factor <= 0.02
        assert 0.0 <= landing.unused <= 9.3 * 1.2 + 2 + 0.03 * 300


def test_a_stalled_evaluation_costs_training_but_does_not_break_the_landing():
    heavy = World(360, 3, work={"eval": 30.0, "save": 2.0}, guessed={"eval": 5.0})
    for seed in range(20):
        landing = simulate(heavy, seed)
        assert -0.01 * 360 <= landing.unused <= 3 + 0.03 * 360
        assert landing.factor <= 0.02


def test_a_budget_just_longer_than_its_start_makes_what_steps_it_can():
    for seed in range(20):
        landing = simulate(World(90, 4, work={"eval": 6.0, "save": 1.0}, events=()), seed)
        assert landing.steps >= 2
        assert landing.over <= 0.9
        assert landing.progress == 1.0


def test_a_leg_after_the_landing_lands_too():
    for seed in range(20):
        landing = simulate(World(180, 2, work=WORK), seed)
        clock, machine = landing.clock, landing.machine
        end = clock.seconds + 60.0
        clock.extend(Limits(seconds=60.0))
        factors = machine.train(clock)
        machine.land(clock)
        assert factors[-1] <= 0.02
        assert max(factors) == 1.0
        assert -1.0 <= end - clock.seconds <= 2 + 0.03 * 60 + 1.0
