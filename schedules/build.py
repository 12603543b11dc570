"""The schedule that a recipe names: a profile with its floor and its warm-up."""

from dataclasses import dataclass
from functools import partial
from typing import assert_never

from ..recipes.schedules import (
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
    ScheduleConfig,
    SquareSchedule,
    UbaSchedule,
    WsdSchedule,
    WsdSSchedule,
)
from .legs import build_leg, one_minus_sqrt, with_last_leg, wsd
from .periodic import Span, piecewise, wsd_s
from .permit import StepPermit
from .profiles import (
    Profile,
    constant,
    cosine,
    inverse_sqrt,
    linear,
    mirror_cosine,
    one_cycle,
    polynomial,
    power,
    rex,
    square,
    uba,
)
from .warmup import NO_WARMUP, Warmup


@dataclass(frozen=True)
class Schedule:
    """A profile with its floor and its warm-up.

    `schedule(x)` is the profile alone; `schedule.factor(permit)` is what the rate of a step is multiplied by.
    leaves_peak_at: the x at which `wsd` begins its last leg; None where a state before it is of no use.
    whole_budget: x is progress through the budget, or the stage, warm-up included, so that periods end at
    shares of it; else it is progress after warm-up.
    """

    name: str
    profile: Profile
    min_factor: float = 0.0
    warmup: Warmup = NO_WARMUP
    leaves_peak_at: float | None = None
    whole_budget: bool = False

    def __call__(self, x: float) -> float:
        """`min_factor + (1 - min_factor) * profile(x)`, with x clamped to [0, 1]: no curve rises again."""
        x = min(max(x, 0.0), 1.0)
        return self.min_factor + (1.0 - self.min_factor) * self.profile(x)

    def factor(self, permit: StepPermit) -> float:
        """Factor in [0, 1] for the step that `permit` allows: its share of the warm-up times the profile."""
        x = permit.annealed
        if self.whole_budget and (x > 0.0 or permit.place < 1.0):  # the only step of a run is not annealed
            x = permit.place
        return permit.warmup * self(x)


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that the recipe names."""
    warmup = Warmup.from_recipe(config.warmup_steps)
    floor = 0.0 if isinstance(config, ConstantSchedule | OneCycleSchedule) else config.min_factor
    leaves_peak_at: float | None = None
    profile: Profile
    match config:
        case ConstantSchedule():
            profile = constant
        case LinearSchedule():
            profile = linear
        case CosineSchedule():
            profile = cosine
        case PolynomialSchedule():
            profile = partial(polynomial, power=config.power)
        case RexSchedule():
            profile = partial(rex, d=config.d)
        case UbaSchedule():
            profile = partial(uba, phi=config.phi)
        case MirrorCosineSchedule():
            profile = mirror_cosine
        case SquareSchedule():
            profile = square
        case WsdSchedule():
            leg = build_leg(config.decay_type, config.decay_to)
            profile = partial(wsd, decay_fraction=config.decay_fraction, leg=leg)
            leaves_peak_at = 1.0 - config.decay_fraction
        case WsdSSchedule():
            leg = build_leg(config.decay_type, config.decay_to)
            ends = _ends(config.periods)
            profile = partial(wsd_s, ends=ends, decay_fraction=config.decay_fraction, leg=leg)
        case OneCycleSchedule():
            profile = partial(
                one_cycle,
                pct_start=config.pct_start,
                div_factor=config.div_factor,
                final_div_factor=config.final_div_factor,
                anneal=cosine if config.anneal_strategy == "cos" else linear,
            )
        case InverseSqrtSchedule():
            profile = _landing(partial(inverse_sqrt, timescale=config.timescale), config)
        case PowerSchedule():
            profile = _landing(partial(power, hold=config.hold, b=config.b), config)
        case PiecewiseSchedule():
            profile = partial(piecewise, spans=_spans(config.pieces))
        case _:
            assert_never(config)
    whole = isinstance(config, WsdSSchedule | PiecewiseSchedule)
    return Schedule(config.name, profile, floor, warmup, leaves_peak_at, whole)


def decay_factor(config: ScheduleConfig, progress: float) -> float:
    """What optimizer.weight_decay is multiplied by at `progress` through the budget, clamped to [0, 1].

    `schedule.weight_decay`: constant is 1; linear and cosine go from 1 to 0, warm-up or not.
    """
    x = min(max(progress, 0.0), 1.0)
    match config.weight_decay:
        case "constant":
            return 1.0
        case "linear":
            return linear(x)
        case "cosine":
            return cosine(x)
        case _:
            assert_never(config.weight_decay)


def _landing(profile: Profile, config: InverseSqrtSchedule | PowerSchedule) -> Profile:
    if config.decay_fraction == 0:
        return profile
    leg = build_leg(config.decay_type, config.decay_to)
    return partial(with_last_leg, profile=profile, decay_fraction=config.decay_fraction, leg=leg)


def _ends(periods: int | list[float]) -> tuple[float, ...]:
    if isinstance(periods, int):
        return tuple((number + 1) / periods for number in range(periods))
    return tuple(periods)


def _spans(pieces: list[Piece]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for piece in pieces:
        start = piece.start if piece.start is not None else spans[-1].end if spans else 1.0
        rest = start if piece.profile == "constant" else 0.0
        spans.append(Span(piece.until, _shape(piece), start, rest if piece.end is None else piece.end))
    return tuple(spans)


def _shape(piece: Piece) -> Profile:
    match piece.profile:
        case "constant":
            return constant
        case "linear":
            return linear
        case "cosine":
            return cosine
        case "1-sqrt":
            return one_minus_sqrt
        case "rex":
            return rex
        case "uba":
            return uba
        case "mirror_cosine":
            return mirror_cosine
        case "square":
            return square
        case "wsd":
            return wsd
        case _:
            assert_never(piece.profile)
