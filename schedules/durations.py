"""How long an evaluation, a save, an export will take: learned from the earlier ones and from the steps.

Other programs, a slower machine after a resume, or a slow moment at the start stretch everything at once.
Steps are measured all the time and evaluations now and then, so what was measured long ago is scaled by how
the steps' pace has changed since, and what was only ever measured before the first step by how much less
evaluations took later than they did at that time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT = 8
"""Durations kept for each kind."""
UNKNOWN_MARGIN = 0.05
"""Added to a guess that has never been measured in this run."""
KNOWN_MARGIN = 0.03
"""Added to what was measured."""
STALL = 2.0
"""The last one counts for at most this many times the one before it, until the next one confirms it."""
STEADY_STALL = 1.5
"""The same, when two before it agree, or the one before was no more than a return to what was usual."""
DOUBT = 1.1
"""One that took less than the one before is believed, with this factor on top."""
TREND = 1.1
"""Two rises in a row by more than this factor are expected to go on."""
PACE_NOISE = 1.05
"""A change of the steps' pace by less than this factor is none."""
MOST_SCALING = 4.0
"""The steps' pace stretches or shrinks what was measured by at most this factor."""
MOST_CORRECTION = 3.0
"""Evaluations shrink what was measured before the first step by at most this factor."""
MOST_GROWTH = 2.0
"""A guess that was never measured grows with the steps' seconds by at most this factor."""
MOST_KEPT = 2.0
"""For what can be made smaller no more than this many times its usual seconds are kept."""


@dataclass(frozen=True)
class Measured:
    """Seconds for one unit of `size` (rows of an evaluation), and the steps' seconds per token at that time;
    None before the first steps.
    """

    seconds: float
    size: float = 1.0
    pace: float | None = None


@dataclass
class Durations:
    """Measured seconds by kind ("load", "eval", "save", ...), and the guesses for what was not measured yet.

    pace: the steps' seconds per token now, None until it is known; early: when it was first known.
    least: for kinds whose landing can be made smaller, the size (rows) that it has at least.
    """

    guess: Mapping[str, float] = field(default_factory=dict)
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    pace: float | None = None
    early: float | None = None
    least: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        seconds: float,
        *,
        size: float = 1.0,
        whole: bool = True,
        at_most: float | None = None,
    ) -> None:
        """Count what was spent; learn from it, up to at_most, only when whole, not cut short by an error."""
        self.totals[kind] = self.totals.get(kind, 0.0) + seconds
        if whole and size > 0:
            seconds = seconds if at_most is None else min(seconds, at_most)
            self.measured.setdefault(kind, []).append(Measured(seconds / size, size, self.pace))
            del self.measured[kind][:-KEPT]

    def set_pace(self, pace: float | None) -> None:
        """The steps' seconds per token at this moment."""
        self.pace = pace
        if self.early is None:
            self.early = pace

    def expected(self, kind: str) -> float:
        """Seconds kept for the one that belongs to the landing, which is as large as the largest so far.

        One that can be made smaller, and now takes much longer than it did, gets no more than MOST_KEPT times
        the guess or the quickest so far, or what its least size takes: a machine that became slow must not
        give all that is left of a short budget to an evaluation.
        """
        whole = self.unhurried(kind)
        if kind not in self.least:
            return whole
        least = self._expected(kind, lambda _: self.least[kind])
        known = self.measured.get(kind, [])
        largest = max((one.size for one in known), default=0.0)
        quickest = min((one.seconds for one in known), default=0.0) * largest
        return min(whole, max(MOST_KEPT * max(self.guess.get(kind, 0.0), quickest), least))

    def unhurried(self, kind: str) -> float:
        """Seconds of the one that belongs to the landing, however long that is."""
        return self._expected(kind, max)

    def next(self, kind: str) -> float:
        """Seconds of the next one between two steps, which is as large as the last."""
        return self._expected(kind, lambda sizes: sizes[-1])

    def _expected(self, kind: str, choose: Callable[[list[float]], float]) -> float:
        known = self.measured.get(kind)
        if not known:
            slower = min(max(1.0, self._now(Measured(1.0))), MOST_GROWTH)
            return self.guess.get(kind, 0.0) * slower * (1 + UNKNOWN_MARGIN)
        size = choose([one.size for one in known])
        start = self._start_correction() if known[-1].pace is None else 1.0
        return _next_of([self._now(one) for one in known]) * start * size * (1 + KNOWN_MARGIN)

    def _now(self, one: Measured) -> float:
        """What it would take at the present pace."""
        then = one.pace if one.pace is not None else self.early
        if not then or not self.pace:
            return one.seconds
        change = self.pace / then
        change = max(1.0, change / PACE_NOISE) if change > 1.0 else min(1.0, change * PACE_NOISE)
        return one.seconds * min(max(change, 1 / MOST_SCALING), MOST_SCALING)

    def _start_correction(self) -> float:
        """How much quicker the machine has become since before the first step, by what was measured at both
        times; 1 where nothing was, and never more.
        """
        found = [1.0]
        for known in self.measured.values():
            before = [one for one in known if one.pace is None]
            if before and known[-1].pace is not None:
                found.append(self._now(known[-1]) / self._now(before[-1]) if before[-1].seconds else 1.0)
        return max(min(found), 1 / MOST_CORRECTION)

    def state_dict(self) -> dict[str, Any]:
        """Amounts, as plain values."""
        return {
            "measured": {
                kind: [[one.seconds, one.size, one.pace] for one in known]
                for kind, known in self.measured.items()
            },
            "totals": dict(self.totals),
            "early": self.early,
        }

    def load_state_dict(self, state: Mapping[str, Any], pace: float | None) -> None:
        """Take over what an earlier process measured; what this one has measured already comes after it."""
        for kind, known in state["measured"].items():
            earlier = [Measured(*one) if isinstance(one, list) else Measured(float(one)) for one in known]
            self.measured[kind] = [*earlier, *self.measured.get(kind, [])][-KEPT:]
        for kind, total in state["totals"].items():
            self.totals[kind] = self.totals.get(kind, 0.0) + float(total)
        self.early = state.get("early", pace)
        self.pace = pace


def _next_of(seconds: list[float]) -> float:
    """The next of a series: the last, with doubt where it fell, with a trend where it rises and rises."""
    last = seconds[-1]
    if len(seconds) == 1:
        return last
    before = seconds[-2]
    if last <= before:
        return min(before, DOUBT * last)
    if len(seconds) == 2:
        return min(last, STALL * before)
    believed = min(last, max(STEADY_STALL * before, seconds[-3]))
    rise = min(believed / before, before / seconds[-3])
    return believed * rise if rise > TREND and believed == last else believed
