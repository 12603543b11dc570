"""How often to take a snapshot."""

from __future__ import annotations

import math
import os

BETWEEN_DEATHS = 6 * 3600.0
"""Mean seconds between two deaths of a process (a crash, memory that runs out, a kill): an assumption."""
MOST_OFTEN = 1.0
"""Seconds between two snapshots at least, where the interval follows from their cost."""


def snapshot_interval(
    cost_seconds: float, mean_time_between_failures: float, *, at_least: float = 0.0
) -> float:
    """Seconds of training between snapshots for the least expected loss of time.

    cost_seconds: by which one snapshot delays the training (what `wait` waited, and what the copying slows).
    mean_time_between_failures: seconds, of the failures that this kind of snapshot survives. at_least: a
    lower bound, such as the seconds that copying one takes. ValueError unless both are above 0.

    Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
    Computer Systems 22 (2006), eq. 37, a perturbation of the exact optimum in cost/(2 MTBF).
    """
    cost, between = cost_seconds, mean_time_between_failures
    if not (0 < cost < math.inf and 0 < between < math.inf):
        raise ValueError(f"cost ({cost}) and mean time between failures ({between}) must be above 0 seconds")
    if cost >= 2 * between:
        return max(between, at_least)
    ratio = cost / (2 * between)
    interval = math.sqrt(2 * cost * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost
    return max(interval, at_least)


def interval_by_cost(blocking: float, copying: float) -> float:
    """Seconds between two snapshots, of which the last one held the training up for `blocking` seconds and
    was copied in `copying`, which took one of its processors for that time.
    """
    cost = max(1e-4, blocking + copying / (os.cpu_count() or 1))
    return snapshot_interval(cost, BETWEEN_DEATHS, at_least=MOST_OFTEN)
