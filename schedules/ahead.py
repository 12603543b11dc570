"""What is still to come beside the steps: events that recur, and the landing."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .cadence import Cadence
from .durations import Durations
from .estimates import StepTime

LAST_STEP_DOUBT = 0.4
"""The next step must fit with this much to spare, or this one is taken for the last and lands at x = 1."""


@dataclass
class Ahead:
    """Predicted seconds. landed: kinds of the landing that are done."""

    durations: Durations
    step_time: StepTime
    cadences: list[Cadence] = field(default_factory=list)
    landed: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        reserve_guess: Mapping[str, float] | None,
        least_sizes: Mapping[str, float] | None,
        seconds_per_token: float | None,
    ) -> Ahead:
        """With the plan's guesses alone."""
        durations = Durations(dict(reserve_guess or {}), least=dict(least_sizes or {}))
        return cls(durations, StepTime(guess=seconds_per_token))

    @property
    def reserve(self) -> float:
        """Of what must still happen after the last step."""
        kinds = [kind for kind in self.durations.guess if kind not in self.landed]
        return sum(self.durations.expected(kind) for kind in kinds)

    def event(self, cadence: Cadence) -> float:
        """Of one occurrence of the event."""
        return sum(self.durations.next(kind) for kind in cadence.kinds)

    def events(self, steps_done: int, steps: float, end: float) -> float:
        """Of the events due in the next `steps` steps, before the moment `end`; none after the last."""
        between = max(0, math.floor(steps) - 1)
        until = steps_done + math.floor(steps)
        return sum(
            min(cadence.count(until, 1.0, end), between) * self.event(cadence) for cadence in self.cadences
        )

    def training_left(self, room: float, following: float, *, steps_done: int, end: float) -> float | None:
        """Of training after the step about to run, when it leaves `room` seconds until `end`; None when no
        further step fits.

        following: seconds of one step. Events take from the room, and how many there will be depends on how
        many steps fit beside them. The end of the last step is uncertain by a part of a step, so one of them
        is not counted.
        """
        if room <= following * (1.0 + LAST_STEP_DOUBT):
            return None
        if not following:
            return room
        fits = bisect.bisect_right(
            range(math.ceil(room / following)),
            room,
            key=lambda more: (1 + more) * following + self.events(steps_done, 2 + more, end),
        )
        return max(0.0, room - self.events(steps_done, 1 + fits, end) - following)
