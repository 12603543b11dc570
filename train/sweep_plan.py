"""Successive halving as arithmetic: who runs how far, and what a whole trial may use.

With n trials and a reduction r (arXiv:1502.07943, arXiv:1603.06560), all trials train to the first pause, the
better third (for r = 3) goes on to the second, and one goes to its end. k pauses lie at

    p_i = r^(i - k - 1),  i = 1 .. k,  p_0 = 0,  p_{k+1} = 1

shares of one trial's budget, and n_i = ceil(n / r^(i - 1)) trials run leg i from p_{i-1} to p_i, n_{k+1} = 1.
What a whole trial trains, W, follows from the budget B of all:

    sum_i n_i (start_i + (p_i - p_{i-1}) W + end_i) = B

where `start` is what a process costs before it trains and `end` what follows: the measurement and the
checkpoint of a pause, or the landing. For budgets in tokens or steps both are nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..recipes.errors import UserError, in_columns


@dataclass(frozen=True)
class Overheads:
    """Seconds of a leg outside its training: before it in a new run and in a resumed one, and after it."""

    first: float = 0.0
    again: float = 0.0
    pause: float = 0.0
    landing: float = 0.0

    def start(self, rung: int) -> float:
        """Before the training of leg `rung`."""
        return self.again if rung else self.first


@dataclass(frozen=True)
class Leg:
    """`count` trials train `share` of a trial's budget each, to progress `until`."""

    rung: int
    count: int
    share: float
    until: float


@dataclass(frozen=True)
class Ladder:
    """pauses: shares of a trial's budget, ascending, below 1. counts: trials on each leg, the last one 1."""

    pauses: tuple[float, ...]
    counts: tuple[int, ...]

    def ends(self, rung: int) -> tuple[float, float]:
        """Progress at the beginning and the end of leg `rung`."""
        marks = (0.0, *self.pauses, 1.0)
        return marks[rung], marks[rung + 1]

    def legs(self, rung: int, alive: int) -> list[Leg]:
        """What is still to run when `alive` trials are about to begin leg `rung`; one alone runs through."""
        found: list[Leg] = []
        while rung < len(self.counts):
            count = min(alive, self.counts[rung])
            start, end = self.ends(rung)
            if count == 1:
                return [*found, Leg(rung, 1, 1.0 - start, 1.0)]
            found.append(Leg(rung, count, end - start, end))
            rung += 1
        return found


def make_ladder(trials: int, reduction: int, rungs: int | None = None) -> Ladder:
    """The pauses and who is left after each. rungs: how many pauses; None takes as many as halve down to one.

    Raises UserError when there are more pauses than that.
    """
    counts = [trials]
    while counts[-1] > 1:
        counts.append(-(-trials // reduction ** len(counts)))
    most = len(counts) - 1
    if rungs is not None and not 1 <= rungs <= most:
        text = (
            f"{rungs} is not possible: {trials} trials with --reduction {reduction} are down to one after "
            f"{most}; allowed: 1 to {most}, or auto"
        )
        raise UserError(in_columns([("--rungs", text)]))
    number = most if rungs is None else rungs
    pauses = tuple(1.0 / reduction ** (number - index) for index in range(number))
    return Ladder(pauses, (*counts[:number], 1))


def fixed_amount(legs: Sequence[Leg], costs: Overheads) -> float:
    """What the legs cost outside training, the last one ending in a landing."""
    return sum(
        leg.count * (costs.start(leg.rung) + (costs.landing if leg.until == 1.0 else costs.pause))
        for leg in legs
    )


def trials_worth(legs: Sequence[Leg]) -> float:
    """How many whole trials' training the legs add up to."""
    return sum(leg.count * leg.share for leg in legs)


def whole_trial(left: float, legs: Sequence[Leg], costs: Overheads) -> float:
    """W: what one whole trial trains so that `left` is just enough for `legs`; below 0 when it is not."""
    return (left - fixed_amount(legs, costs)) / trials_worth(legs)


def grant(left: float, legs: Sequence[Leg], costs: Overheads, ladder: Ladder) -> float:
    """What each trial of the first of `legs` is given beyond what it has used: as if it went to its end.

    So it trains at the pace of a whole trial, and its schedule knows the end that it may never see.
    """
    start, _ = ladder.ends(legs[0].rung)
    whole = whole_trial(left, legs, costs)
    return costs.start(legs[0].rung) + (1.0 - start) * whole + costs.landing


def budget_for(first_training: float, legs: Sequence[Leg], costs: Overheads) -> float:
    """The budget with which a trial trains `first_training` before its first pause."""
    return fixed_amount(legs, costs) + trials_worth(legs) * first_training / legs[0].share
