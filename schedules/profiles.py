"""Profiles: pure functions from progress in [0, 1] to a factor in [0, 1], and the schedule made of one.

A profile knows nothing of steps, tokens or time; the Clock turns all of them into progress. Every profile but
`constant` starts at 1 and ends at 0, so that the run ends annealed when the budget ends (budgeted training,
arXiv:1905.04753).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import assert_never

from ..recipes.choices import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    PolynomialSchedule,
    RexSchedule,
    ScheduleConfig,
)
from .permit import StepPermit
from .warmup import NO_WARMUP, Warmup

Profile = Callable[[float], float]


def constant(x: float) -> float:
    """1 everywhere."""
    return 1.0


def linear(x: float) -> float:
    """1 - x; mean 1/2 (arXiv:2502.15938)."""
    return 1.0 - x


def cosine(x: float) -> float:
    """(1 + cos(pi x)) / 2; mean 1/2 (arXiv:1608.03983)."""
    return 0.5 * (1.0 + math.cos(math.pi * x))


def polynomial(x: float, power: float = 1.0) -> float:
    """(1 - x) ** power; mean 1 / (1 + power)."""
    return float((1.0 - x) ** power)


def rex(x: float, d: float = 0.5) -> float:
    """Reflected exponential (arXiv:2107.04197): z / ((1 - d) + d z) with z = 1 - x.

    d = 1/2 is the value that re-implementations give as the paper's, mean 2 (1 - ln 2); axolotl and
    OneTrainer call the same curve with d = 0.9 `rex`. Mean 1/d + (1 - d)/d^2 ln(1 - d).
    """
    z = 1.0 - x
    return z / ((1.0 - d) + d * z)


@dataclass(frozen=True)
class Schedule:
    """A profile with its floor and its warm-up.

    `schedule(x)` is the profile alone, for x in [0, 1] after warm-up; `schedule.factor(permit)` is what the
    rate of a step is multiplied by.
    """

    name: str
    profile: Profile
    min_factor: float = 0.0
    warmup: Warmup = NO_WARMUP

    def __call__(self, x: float) -> float:
        """`min_factor + (1 - min_factor) * profile(x)`, with x clamped to [0, 1]: no cosine rises again."""
        x = min(max(x, 0.0), 1.0)
        return self.min_factor + (1.0 - self.min_factor) * self.profile(x)

    def factor(self, permit: StepPermit) -> float:
        """Factor in [0, 1] for the step that `permit` allows: its share of the warm-up times the profile."""
        return permit.warmup * self(permit.annealed)


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that the recipe names."""
    warmup = Warmup.from_recipe(config.warmup_steps)
    match config:
        case ConstantSchedule():
            return Schedule(config.name, constant, warmup=warmup)
        case LinearSchedule():
            return Schedule(config.name, linear, config.min_factor, warmup)
        case CosineSchedule():
            return Schedule(config.name, cosine, config.min_factor, warmup)
        case PolynomialSchedule():
            return Schedule(config.name, partial(polynomial, power=config.power), config.min_factor, warmup)
        case RexSchedule():
            return Schedule(config.name, partial(rex, d=config.d), config.min_factor, warmup)
        case _:
            assert_never(config)
