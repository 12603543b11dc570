"""What the run has learned about its own steps: how many seconds a token takes, and what passes between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

MEMORY = 0.9
"""Share of the old estimate kept at each new observation."""
STALL = 2.0
"""An observation this many times the estimate is a stall until the next ones confirm it."""
CARRIED = 0.1
"""Weight that an estimate keeps in the next process, which may run on another machine."""
STEADY = 3
"""Steps after which their speed is a measure of the machine."""


@dataclass
class Ema:
    """Exponential mean without start-up bias; one stall is clipped, and a new speed is soon believed.

    Where the median of the last three is off by more than `STALL`, they are the new speed: the mean begins
    anew from it.
    """

    total: float = 0.0
    weight: float = 0.0
    last: float = 0.0
    recent: list[float] = field(default_factory=list)

    @property
    def value(self) -> float | None:
        """The mean, or None before the first observation."""
        return self.total / self.weight if self.weight else None

    def add(self, observed: float) -> None:
        """Take in one observation."""
        value = self.value
        believed = observed if value is None else min(observed, max(STALL * value, self.last))
        self.last = observed
        self.recent = [*self.recent[-2:], observed]
        self.total = MEMORY * self.total + (1 - MEMORY) * believed
        self.weight = MEMORY * self.weight + (1 - MEMORY)
        middle = median(self.recent)
        if len(self.recent) == 3 and not self.total / STALL <= middle * self.weight <= self.total * STALL:
            self.total, self.weight = (1 - MEMORY) * middle, 1 - MEMORY


@dataclass
class StepTime:
    """Seconds of a step from its tokens, so that steps of different sizes are predicted right.

    A step takes `seconds_per_token * tokens` and, between it and the next, an overhead (logging, waiting for
    data). The first step of each process (compilation, cold caches) is not believed; until there is another
    one the prediction is `guess` (seconds per token, from the plan) where given, else that first step.
    """

    guess: float | None = None
    rate: Ema = field(default_factory=Ema)
    overhead: Ema = field(default_factory=Ema)
    learned: int = 0
    first: float | None = None

    def add(self, seconds: float, tokens: int) -> None:
        """Take in a finished step."""
        if self.first is None:
            self.first = seconds / tokens
            return
        self.rate.add(seconds / tokens)
        self.learned += 1

    @property
    def seconds_per_token(self) -> float | None:
        """The estimate, None before anything is known."""
        known = self.rate.value
        if known is not None:
            return known
        return self.guess if self.guess is not None else self.first

    @property
    def pace(self) -> float | None:
        """Seconds per token, once enough steps were seen to judge the machine by."""
        return self.rate.value if self.learned >= STEADY else None

    def predict(self, tokens: float) -> float:
        """Seconds that a step of so many tokens takes with its overhead; 0 when nothing is known."""
        return tokens * (self.seconds_per_token or 0.0) + (self.overhead.value or 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Amounts, as plain values."""
        return {
            "rate": asdict(self.rate),
            "overhead": asdict(self.overhead),
            "learned": self.learned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another process's estimates, which new steps soon outweigh; this process's first step is
        left out again.
        """
        self.rate = Ema(**state["rate"])
        self.overhead = Ema(**state["overhead"])
        for estimate in (self.rate, self.overhead):
            estimate.total *= CARRIED
            estimate.weight *= CARRIED
        self.learned = int(state.get("learned", STEADY))
