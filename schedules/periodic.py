"""Profiles of several periods or pieces.

Each owns its end: at the very x where a piece ends the rate has landed, and the next step begins the next
piece. So a step that ends at a quarter of the budget, and a checkpoint after it, is annealed.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from .legs import one_minus_sqrt, wsd
from .profiles import Profile


def wsd_s(
    x: float, ends: Sequence[float], decay_fraction: float = 0.2, leg: Profile = one_minus_sqrt
) -> float:
    """`wsd` in each period of x, of which `ends` holds the ends, rising to 1; its mean is that of `wsd`.

    WSD-S (arXiv:2410.05192): every period starts at the peak, from the state that the one before annealed,
    so that one run leaves an annealed state at each of several budgets.
    """
    index = min(bisect.bisect_left(ends, x), len(ends) - 1)
    begin = ends[index - 1] if index else 0.0
    return wsd((x - begin) / (ends[index] - begin), decay_fraction, leg)


@dataclass(frozen=True)
class Span:
    """A piece of `piecewise`: `profile` stretched to go from `start` to `end`, up to x = `until`."""

    until: float
    profile: Profile
    start: float
    end: float


def piecewise(x: float, spans: Sequence[Span]) -> float:
    """end + (start - end) profile(u) in the span that holds x, u its share of the span.

    The mean is the sum over spans of length * (end + (start - end) * mean of the profile).
    """
    index = min(bisect.bisect_left([span.until for span in spans], x), len(spans) - 1)
    span, begin = spans[index], spans[index - 1].until if index else 0.0
    return span.end + (span.start - span.end) * span.profile((x - begin) / (span.until - begin))
