"""A simulated machine for the Clock: all work takes as long as a `World` says, in no real time."""

import contextlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from shoestring.recipes import Every
from shoestring.recipes.errors import BudgetError
from shoestring.schedules import Clock, Limits, Schedule, Warmup
from shoestring.schedules.profiles import linear

ROWS = 60
WORK = {"eval": 6.0, "samples": 3.0, "save": 1.5, "export": 3.0, "report": 0.5}


def quiet(at):
    """A machine that is always as fast."""
    return 1.0


@dataclass
class World:
    """What a simulated machine does, in seconds. Lognormal noise: 10 % on steps, 5 % on other work.

    pace: at a moment, how many times slower everything is. slowdown: of steps, in the second half.
    cost_of(kind, n): factor on the n-th piece of work of a kind. first_step: seconds more in the first step
    of a process. stall: seconds more in step 8. stops: (from, seconds), when the process is suspended.
    changes: (from, limits), a new budget. resume: (from, factor): killed there, the next process is so many
    times slower. least: share of the last evaluation that is done in any case; those between are no larger.
    stages: ends of all stages but the last. speed_guess: seconds per token before there is a second step.
    """

    budget: float
    step: float
    startup: float = 60.0
    first_step: float = 0.0
    slowdown: float = 1.0
    stall: float = 0.0
    size_noise: float = 0.0
    step_noise: float = 0.1
    guess_noise: float = 0.15
    speed_guess: float | None = None
    profile: object = linear
    pace: Callable = quiet
    cost_of: Callable = lambda kind, n: 1.0
    stops: tuple = ()
    changes: tuple = ()
    resume: tuple | None = None
    stages: tuple = ()
    limits: Limits | None = None
    work: dict = field(default_factory=lambda: dict(WORK))
    guessed: dict = field(default_factory=dict)
    least: float | None = None
    events: tuple = ((Every(share=0.25), "eval"), (Every(seconds=60.0), "save"))


@dataclass
class Landing:
    """What came of it. over: seconds beyond the budget that held at the end; negative when some was left."""

    over: float
    factor: float
    progress: float
    steps: int
    factors: list
    trace: list
    clock: Clock
    machine: "Machine"

    @property
    def unused(self):
        """Seconds that were left."""
        return -self.over


class Machine:
    """The moments of one run in a world: simulated time passes only here."""

    def __init__(self, world, seed):
        self.world, self.noise = world, random.Random(seed)
        self.at, self.slower, self.counts, self.trace = 0.0, 1.0, {}, []
        self.schedule = Schedule("simulated", world.profile, warmup=Warmup(share=0.03))
        self.guess = {
            kind: self.varied(world.guessed.get(kind, seconds), world.guess_noise)
            for kind, seconds in world.work.items()
        }
        self.cut = False
        self.stops = list(world.stops)
        self.changes = list(world.changes)

    def varied(self, seconds, sigma):
        return seconds * math.exp(self.noise.gauss(0.0, sigma)) if sigma else seconds

    def pass_time(self, seconds):
        """Let this much work pass at the present pace, and whatever suspends the process meanwhile."""
        self.at += seconds * self.world.pace(self.at) * self.slower
        while self.stops and self.at >= self.stops[0][0]:
            self.at += self.stops.pop(0)[1]

    def work(self, clock, kind):
        """One piece of work. The last evaluation is as large as there is time for, the others are small."""
        count = self.counts[kind] = self.counts.get(kind, 0) + 1
        seconds = self.varied(self.world.work[kind], 0.05) * self.world.cost_of(kind, count)
        least = self.world.least if kind == "eval" else None
        with clock.spent(kind, ROWS) as piece:
            if least is None:
                return self.pass_time(seconds)
            piece.size = ROWS * least
            began = self.at
            self.pass_time(seconds * least)
            rest = (self.at - began) * (1.0 - least) / least
            whole = count == 1 or (
                clock.stop_reason is not None and clock.rest_fits(kind, self.at - began, rest)
            )
            if whole:
                piece.size = ROWS
                self.pass_time(seconds * (1.0 - least))
            elif clock.stop_reason is not None:
                self.cut = True

    def step(self, clock, tokens):
        world = self.world
        seconds = self.varied(world.step * tokens / 1000, world.step_noise)
        seconds *= world.slowdown if self.at > world.budget / 2 else 1.0
        seconds += world.first_step if clock.step_time.first is None else 0.0
        seconds += world.stall if clock.steps == 8 else 0.0
        began = self.at
        self.pass_time(seconds)
        clock.finish_step(self.at - began, tokens)
        self.pass_time(0.02)

    def start(self, limits):
        """A process: its Clock, with the seconds that loading takes counted."""
        clock = Clock(
            limits,
            started=self.at,
            now=lambda: self.at,
            reserve_guess=self.guess,
            least_sizes=None if self.world.least is None else {"eval": ROWS * self.world.least},
            seconds_per_token_guess=self.world.speed_guess,
            warmup=self.schedule.warmup,
        )
        self.cadences = [
            (clock.cadence(every, kind), kind) for every, kind in self.world.events if kind in self.world.work
        ]
        return clock

    def resume(self, clock, limits):
        """The process is killed, and another one goes on from its state."""
        state = json.loads(json.dumps([clock.state_dict(), [c.state_dict() for c, _ in self.cadences]]))
        self.slower, before = self.world.resume[1], clock.seconds
        clock = self.start(limits)
        clock.load_state_dict(state[0])
        for (cadence, _), saved in zip(self.cadences, state[1], strict=True):
            cadence.load_state_dict(saved)
        assert clock.seconds == before
        with clock.spent("load"):
            self.pass_time(self.world.startup / 2)
        return clock

    def train(self, clock):
        """Steps and what falls due between them, until the clock says no; the factors of the rate."""
        world, factors = self.world, []
        limits, resume, ends = clock.limits, world.resume, list(world.stages)
        following = round(self.varied(1000, world.size_noise))
        if ends:
            clock.begin_stage(ends.pop(0))
        while True:
            if self.changes and self.at >= self.changes[0][0]:
                limits = self.changes.pop(0)[1]
                with contextlib.suppress(BudgetError):  # spent already: the next permit says so
                    clock.change(limits)
            if resume is not None and self.at >= resume[0]:
                clock, resume = self.resume(clock, limits), None
            tokens, following = following, round(self.varied(1000, world.size_noise))
            permit = clock.plan_step(tokens, next_tokens=following)
            if not permit.go:
                self.clock = clock
                return factors
            factors.append(self.schedule.factor(permit))
            self.trace.append((clock.seconds, permit.progress, permit.annealed))
            self.step(clock, tokens)
            if clock.stage_end < 1.0 and clock.progress >= clock.stage_end:
                clock.begin_stage(ends.pop(0) if ends else 1.0)
            for cadence, kind in self.cadences:
                if clock.should_run(cadence):
                    self.work(clock, kind)

    def land(self, clock):
        """All that follows the last step."""
        for kind in self.world.work:
            self.work(clock, kind)


def simulate(world, seed):
    """One run, from start-up to its last file."""
    machine = Machine(world, seed)
    clock = machine.start(world.limits or Limits(seconds=world.budget))
    with clock.spent("load"):
        machine.pass_time(world.startup)
    for kind in ("eval", "samples"):
        if kind in world.work:
            machine.work(clock, kind)
    factors = machine.train(clock)
    clock = machine.clock
    machine.land(clock)
    given = clock.limits
    if given.cost is not None:
        over = (clock.cost - given.cost) / given.price_per_hour * 3600.0
    else:
        over = clock.seconds - given.seconds
    return Landing(over, factors[-1], clock.progress, clock.steps, factors, machine.trace, clock, machine)
