"""Last legs: what brings a rate that was held down at the end, and profiles that end with one."""

import math
from functools import partial
from typing import Literal, assert_never

from .profiles import Profile, cosine, linear

DECAY_TO = 0.1
"""Where legs that never reach 0 end unless told otherwise."""

DecayType = Literal["linear", "cosine", "1-sqrt", "inverse", "exponential"]


def one_minus_sqrt(x: float) -> float:
    """1 - sqrt(x); mean 1/3 (arXiv:2405.18392)."""
    return 1.0 - math.sqrt(x)


def inverse(x: float, to: float = DECAY_TO) -> float:
    """1 / ((1 - x) + x / to): 1 / rate moves in a straight line; mean ln(1/to) / (1/to - 1).

    The leg of WSD-S (arXiv:2410.05192).
    """
    return 1.0 / ((1.0 - x) + x / to)


def exponential(x: float, to: float = DECAY_TO) -> float:
    """to ** x; mean (1 - to) / ln(1/to) (the leg of MiniCPM, arXiv:2404.06395, which gives a half-life)."""
    return float(to**x)


def build_leg(decay_type: DecayType, decay_to: float | None = None) -> Profile:
    """The leg of that name; `decay_to` is for `inverse` and `exponential`."""
    to = DECAY_TO if decay_to is None else decay_to
    match decay_type:
        case "linear":
            return linear
        case "cosine":
            return cosine
        case "1-sqrt":
            return one_minus_sqrt
        case "inverse":
            return partial(inverse, to=to)
        case "exponential":
            return partial(exponential, to=to)
        case _:
            assert_never(decay_type)


def with_last_leg(x: float, profile: Profile, decay_fraction: float, leg: Profile) -> float:
    """`profile`, and over the last `decay_fraction` the value it has there times `leg`."""
    start = 1.0 - decay_fraction
    return profile(x) if x <= start else profile(start) * leg((x - start) / (1.0 - start))


def wsd(x: float, decay_fraction: float = 0.2, leg: Profile = one_minus_sqrt) -> float:
    """1, then `leg` over the last `decay_fraction` f; mean 1 - f (1 - mean of the leg).

    Warm-up, stable, decay (arXiv:2404.06395).
    """
    start = 1.0 - decay_fraction
    return 1.0 if x <= start else leg((x - start) / (1.0 - start))
