"""Landing: simulated runs with noise, slow starts, slowdowns, stalls and wrong guesses end on time."""

import math
import random
from dataclasses import dataclass, field

import pytest
from shoestring.recipes import Every
from shoestring.schedules import Clock, Limits, Schedule, Warmup
from shoestring.schedules.profiles import cosine, linear, rex

SEEDS = 60


@dataclass
class World:
    """What a simulated machine does, in seconds. Lognormal noise: 10 % on steps, 5 % on other work."""

    budget: float
    step: float
    startup: float = 60.0
    first_step: float = 0.0
    slowdown: float = 1.0
    stall: float = 0.0
    size_noise: float = 0.0
    guess_noise: float = 0.15
    profile: object = linear
    work: dict = field(
        default_factory=lambda: {"eval": 6.0, "samples": 3.0, "save": 1.5, "export": 3.0, "report": 0.5}
    )
    guessed: dict = field(default_factory=dict)
    events: tuple = ((Every(share=0.25), "eval"), (Every(seconds=60.0), "save"))


@dataclass
class Landing:
    over: float
    unused: float
    factor: float
    progress: float
    steps: int
    factors: list


def simulate(world, seed):
    noise = random.Random(seed)
    at = [0.0]

    def varied(seconds, sigma):
        return seconds * math.exp(noise.gauss(0.0, sigma))

    guess = {k: varied(world.guessed.get(k, v), world.guess_noise) for k, v in world.work.items()}
    schedule = Schedule("simulated", world.profile, warmup=Warmup(share=0.03))
    clock = Clock(
        Limits(seconds=world.budget),
        started=0.0,
        now=lambda: at[0],
        reserve_guess=guess,
        warmup=schedule.warmup,
    )

    def work(kind):
        with clock.spent(kind):
            at[0] += varied(world.work[kind], 0.05)

    with clock.spent("load"):
        at[0] += world.startup
    for kind in ("eval", "samples"):
        if kind in world.work:
            work(kind)
    cadences = [(clock.cadence(every, kind), kind) for every, kind in world.events if kind in world.work]
    factors = []
    following = round(varied(1000, world.size_noise))
    while True:
        tokens, following = following, round(varied(1000, world.size_noise))
        permit = clock.plan_step(tokens, next_tokens=following)
        if not permit.go:
            break
        factors.append(schedule.factor(permit))
        seconds = varied(world.step * tokens / 1000, 0.1)
        seconds *= world.slowdown if at[0] > world.budget / 2 else 1.0
        seconds += world.first_step if clock.steps == 0 else 0.0
        seconds += world.stall if clock.steps == 8 else 0.0
        at[0] += seconds
        clock.finish_step(seconds, tokens)
        at[0] += 0.02
        for cadence, kind in cadences:
            if clock.should_run(cadence):
                work(kind)
    for kind in world.work:
        work(kind)
    over = at[0] - world.budget
    return Landing(over, -over, factors[-1], clock.progress, clock.steps, factors)


LONG_WORK = {"eval": 40.0, "save": 30.0}
WORLDS = {
    "3 min, 2 s steps": World(180, 2),
    "3 min, 3 s steps": World(180, 3),
    "3 min, 4 s steps": World(180, 4),
    "3 min, 4 s steps, rex": World(180, 4, profile=rex),
    "3 min, sizes differ": World(180, 3, size_noise=0.2),
    "3 min, slow first step": World(180, 3, first_step=20),
    "3 min, stall": World(180, 2, stall=20),
    "3 min, evaluation takes twice the guess": World(180, 3, guessed={"eval": 3.0}),
    "3 min, slowdown": World(180, 2, slowdown=1.3),
    "6 min": World(360, 3, profile=cosine),
    "1 hour, as in the reference": World(
        3600, 2, 30, 90, 1.3, work=LONG_WORK, events=((Every(share=0.1), "eval"),)
    ),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_a_time_budget_is_landed_on(world):
    landings = [simulate(world, seed) for seed in range(4 if world.budget > 1000 else SEEDS)]
    longest = world.step * world.slowdown * math.exp(4 * world.size_noise)
    assert max(landing.over for landing in landings) <= 0.01 * world.budget
    assert max(landing.unused for landing in landings) <= longest + 0.03 * world.budget
    assert -0.035 <= sum(landing.over for landing in landings) / len(landings) / world.budget <= 0.003
    annealed = [landing.factor <= 0.02 and landing.progress >= 0.98 for landing in landings]
    assert sum(annealed) >= 0.96 * len(annealed)
    assert max(landing.factor for landing in landings) <= 0.06
    assert all(max(landing.factors) == 1.0 for landing in landings)
    # Time at rate zero is time wasted: only the last step, and rarely one that fits unexpectedly.
    idle = [sum(factor == 0.0 for factor in landing.factors) for landing in landings]
    assert sum(idle) / len(idle) <= 1.5
    assert max(idle) <= 3


def test_the_mean_rate_of_a_run_is_the_area_of_its_profile():
    for profile, area in ((linear, 0.5), (rex, 2 * (1 - math.log(2)))):
        factors = simulate(World(900, 2, profile=profile, work={"save": 5.0}), 0).factors
        assert sum(factors) / len(factors) == pytest.approx(area, abs=0.03)


def test_the_rate_falls_in_small_steps_after_the_warm_up():
    factors = simulate(World(900, 2, events=((Every(steps=50), "eval"),)), 1).factors
    top = factors.index(1.0)
    assert top >= 9
    drops = [a - b for a, b in zip(factors[top:], factors[top + 1 :], strict=False)]
    assert min(drops) >= 0.0
    assert max(drops) <= 0.03


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
