"""When something recurs: every so many steps, shares of the budget, or seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..recipes.quantities import Every


@dataclass
class Cadence:
    """A recurring event, such as evaluation; `kinds` are the names under which the Clock measures its
    duration.

    Due when a multiple of `every` lies between the last time and now; once, when one step passed several of
    them. The end of the run is no such multiple: what happens there is the landing, not an event. Seconds
    count from the first step. What is remembered are amounts, so a resumed run may use another `every`.
    leg: the one whose progress is meant.
    """

    every: Every
    kinds: tuple[str, ...] = ()
    step: int = 0
    progress: float = 0.0
    seconds: float | None = None
    leg: int = 0

    def due(self, step: int, progress: float, seconds: float) -> bool:
        """Whether it is time, after `step` finished steps, at `progress` through the budget and at
        `seconds`.
        """
        if self.every.seconds is not None:
            if self.seconds is None:
                self.seconds = seconds
            return seconds - self.seconds >= self.every.seconds
        return self._multiples(step, progress) > self._multiples(self.step, self.progress)

    def fired(self, step: int, progress: float, seconds: float) -> None:
        """It happened, or was decided against: not again before the next multiple."""
        self.step = max(self.step, step)
        self.progress = max(self.progress, progress)
        self.seconds = seconds

    def count(self, step: int, progress: float, seconds: float) -> int:
        """How often it will still be due on the way to that point, the point itself left out."""
        if self.every.seconds is not None:
            waited = 0.0 if self.seconds is None else seconds - self.seconds
            return max(0, math.ceil(waited / self.every.seconds) - 1)
        before_end = step - 1 if self.every.steps is not None else step
        return max(0, self._multiples(before_end, progress) - self._multiples(self.step, self.progress))

    def _multiples(self, step: int, progress: float) -> int:
        if self.every.steps is not None:
            return step // self.every.steps
        assert self.every.share is not None
        before_end = math.ceil(1.0 / self.every.share - 1e-9) - 1
        return min(math.floor(progress / self.every.share + 1e-9), before_end)

    def restart(self, leg: int) -> None:
        """Progress starts again at zero, in this leg."""
        self.leg, self.progress = leg, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"step": self.step, "progress": self.progress, "seconds": self.seconds, "leg": self.leg}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the progress of an earlier leg is over."""
        self.step = int(state["step"])
        self.progress = float(state["progress"]) if int(state.get("leg", 0)) == self.leg else 0.0
        self.seconds = None if state["seconds"] is None else float(state["seconds"])
