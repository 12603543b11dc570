"""Profiles: pure functions from progress x in [0, 1] to a factor in [0, 1].

A profile knows nothing of steps, tokens or time; the Clock turns all of them into progress. Most start at 1
and end at 0, so that the run ends annealed when the budget ends (budgeted training, arXiv:1905.04753). The
mean of a profile, its integral over [0, 1], says how much rate it spends against a constant one.
"""

import math
from collections.abc import Callable

Profile = Callable[[float], float]


def constant(x: float) -> float:
    """1 everywhere."""
    return 1.0


def linear(x: float) -> float:
    """1 - x; mean 1/2 (arXiv:1905.04753; after a warm-up it is D2Z, arXiv:2502.15938)."""
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


def uba(x: float, phi: float = 1.0) -> float:
    """1 / (1 + phi/2 tan^2(pi x / 2)); mean 1 / (1 + sqrt(phi / 2)). Experimental.

    "Stepsize anything" (arXiv:2505.24452). The formula is second-hand, from third-party training code, and
    phi = 1 is our default. What speaks for it: with phi = 2 kappa it is, up to an affine map, the order from
    large to small of the steps that minimise the worst case of a quadratic whose curvatures span a factor of
    kappa (Chebyshev). phi = 2 is the cosine, phi -> 0 a constant. Written with u = cos^2(pi x / 2) so that
    nothing is divided by zero at x = 1.
    """
    u = math.cos(0.5 * math.pi * x) ** 2 if x < 1.0 else 0.0
    return u / (0.5 * phi + (1.0 - 0.5 * phi) * u)


def mirror_cosine(x: float) -> float:
    """2 (1 - x) - cosine(x); mean 1/2 (a cooldown shape of arXiv:2405.18392)."""
    return 2.0 * (1.0 - x) - cosine(x)


def square(x: float) -> float:
    """1 - x^2; mean 2/3 (a cooldown shape of arXiv:2405.18392)."""
    return 1.0 - x * x


def inverse_sqrt(x: float, timescale: float) -> float:
    """sqrt(t / (t + x)) with t = timescale; mean 2 sqrt(t) (sqrt(1 + t) - sqrt(t)).

    The rate of arXiv:1706.03762 after its warm-up, as transformers has it: their timescale in steps over the
    steps after warm-up is ours. It never reaches 0.
    """
    return math.sqrt(timescale / (timescale + x))


def power(x: float, hold: float, b: float = -0.51) -> float:
    """1 up to `hold`, then (x / hold) ** b; for b != -1 its mean is h + (h^-b - h) / (b + 1), h = hold.

    The power scheduler (arXiv:2408.13359), min(peak, beta a n^b) over the peak, n tokens. It never reaches 0.
    """
    return 1.0 if x <= hold else float((x / hold) ** b)


def power_hold(
    peak_rate: float, *, batch_sequences: float, tokens: float, a: float = 4.6, b: float = -0.51
) -> float:
    """The `hold` of `power` for a budget of `tokens`: where beta a n^b falls below the peak rate.

    beta is the batch in sequences; a = 4.6 and b = -0.51 are what levanter gives as the paper's values
    (arXiv:2408.13359). At most 1: a small peak rate is never left within the budget.
    """
    return min(1.0, float((peak_rate / (batch_sequences * a)) ** (1.0 / b)) / tokens)


def one_cycle(
    x: float,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal: Profile = cosine,
) -> float:
    """From 1 / div_factor up to 1 at `pct_start`, then down to 1 / (div_factor final_div_factor).

    Both ways in the shape of `anneal` (arXiv:1708.07120; names and defaults of torch's OneCycleLR). With
    shapes of mean 1/2 the mean is pct_start (1 + s) / 2 + (1 - pct_start) (1 + e) / 2 for ends s and e.
    """
    low = 1.0 / div_factor
    if x <= pct_start:
        return 1.0 + (low - 1.0) * anneal(x / pct_start)
    end = low / final_div_factor
    return end + (1.0 - end) * anneal((x - pct_start) / (1.0 - pct_start))
