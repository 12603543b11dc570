"""What the run has learned about its own speed: seconds of a step, seconds of an evaluation, a save, an
export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MEMORY = 0.9
"""Share of the old estimate kept at each new observation."""
STALL = 2.0
"""An observation this many times the estimate is a stall until the next one confirms it."""
KEPT = 8
"""Durations kept for each kind."""
UNKNOWN_MARGIN = 0.05
"""Added to a guess that has never been measured in this run."""
KNOWN_MARGIN = 0.03
"""Added to what was measured."""


@dataclass
class Ema:
    """Exponential mean without start-up bias; one stall is clipped, a lasting slowdown is soon believed."""

    total: float = 0.0
    weight: float = 0.0
    last: float = 0.0

    @property
    def value(self) -> float | None:
        """The mean, or None before the first observation."""
        return self.total / self.weight if self.weight else None

    def add(self, observed: float) -> None:
        """Take in one observation."""
        value = self.value
        believed = observed if value is None else min(observed, max(STALL * value, self.last))
        self.last = observed
        self.total = MEMORY * self.total + (1 - MEMORY) * believed
        self.weight = MEMORY * self.weight + (1 - MEMORY)


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
    learned_seconds: float = 0.0
    learned_tokens: int = 0
    first: float | None = None

    def add(self, seconds: float, tokens: int) -> None:
        """Take in a finished step."""
        if self.first is None:
            self.first = seconds / tokens
            return
        self.rate.add(seconds / tokens)
        self.learned_seconds += seconds
        self.learned_tokens += tokens

    @property
    def seconds_per_token(self) -> float | None:
        """The estimate, None before anything is known."""
        known = self.rate.value
        if known is not None:
            return known
        return self.guess if self.guess is not None else self.first

    def predict(self, tokens: float) -> float:
        """Seconds that a step of so many tokens takes with its overhead; 0 when nothing is known."""
        return tokens * (self.seconds_per_token or 0.0) + (self.overhead.value or 0.0)

    def trained_seconds(self, tokens: int, steps: int) -> float:
        """Seconds that `steps` steps with `tokens` tokens were worth; first steps count at the usual speed.

        A first step of 90 s that did 2 s of work has trained for 2 s, so it does not move the schedule by 90
        s.
        """
        if self.learned_tokens:
            per_token = self.learned_seconds / self.learned_tokens
        else:
            per_token = self.seconds_per_token or 0.0
        return tokens * per_token + steps * (self.overhead.value or 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Amounts, as plain values."""
        return {
            "rate": vars(self.rate).copy(),
            "overhead": vars(self.overhead).copy(),
            "learned_seconds": self.learned_seconds,
            "learned_tokens": self.learned_tokens,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another process's estimates; this process's first step is left out again."""
        self.rate = Ema(**state["rate"])
        self.overhead = Ema(**state["overhead"])
        self.learned_seconds = float(state["learned_seconds"])
        self.learned_tokens = int(state["learned_tokens"])


@dataclass
class Durations:
    """Measured seconds by kind ("load", "eval", "save", ...), and the guesses for what was not measured
    yet.
    """

    guess: Mapping[str, float] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, seconds: float, *, whole: bool = True) -> None:
        """Count what was spent; learn from it only when whole, not cut short by an error."""
        self.totals[kind] = self.totals.get(kind, 0.0) + seconds
        if whole:
            self.measured.setdefault(kind, []).append(seconds)
            del self.measured[kind][:-KEPT]

    def expected(self, kind: str) -> float:
        """Seconds that one more of this kind takes: the longer of the last two, else the guess; with its
        margin.
        """
        measured = self.measured.get(kind)
        if measured:
            return max(measured[-2:]) * (1 + KNOWN_MARGIN)
        return self.guess.get(kind, 0.0) * (1 + UNKNOWN_MARGIN)

    def state_dict(self) -> dict[str, Any]:
        """Amounts, as plain values."""
        return {"measured": {k: list(v) for k, v in self.measured.items()}, "totals": dict(self.totals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what an earlier process measured; what this one has measured already comes after it."""
        for kind, seconds in state["measured"].items():
            self.measured[kind] = [*map(float, seconds), *self.measured.get(kind, [])][-KEPT:]
        for kind, total in state["totals"].items():
            self.totals[kind] = self.totals.get(kind, 0.0) + float(total)
