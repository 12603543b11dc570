"""Steps, tokens and epochs: what was counted, and the progress that limits in them give.

    x = x0 + (1 - x0) * (counted - a) / (limit - a)

with `x0` the progress and `a` the count where the present limits began to hold: both zero, unless the budget
was changed or extended on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .limits import Limits

WHOLE = 1e-9
"""Shares this near to a whole are whole."""


@dataclass(frozen=True)
class Anchor:
    """Where the present slope of progress begins."""

    progress: float = 0.0
    steps: int = 0
    tokens: int = 0
    epochs: float = 0.0


@dataclass
class Counted:
    """What was counted, over all legs; the same on every process."""

    steps: int = 0
    tokens: int = 0
    epochs: float = 0.0
    anchor: Anchor = field(default_factory=Anchor)

    def anchor_at(self, progress: float) -> None:
        """From here on the limits' slope goes from `progress` to 1."""
        self.anchor = Anchor(progress, self.steps, self.tokens, self.epochs)

    def add(self, tokens: int, epochs: float) -> None:
        """Count a finished step. epochs: passes over the rows in all."""
        self.steps += 1
        self.tokens += tokens
        self.epochs = epochs

    def progress_after(
        self, limits: Limits, tokens: int, epochs: float, next_tokens: int | None
    ) -> tuple[float, str | None]:
        """Progress at the end of a step of `tokens`, and the limit that forbids the step."""
        begin, shares = self.anchor, [0.0]
        if limits.steps is not None:
            if self.steps >= limits.steps:
                return 1.0, "steps"
            shares.append((self.steps + 1 - begin.steps) / (limits.steps - begin.steps))
        if limits.tokens is not None:
            after = self.tokens + tokens
            if after > limits.tokens:
                return 1.0, "tokens"
            last = after + (next_tokens or tokens) > limits.tokens
            shares.append(1.0 if last else (after - begin.tokens) / (limits.tokens - begin.tokens))
        if limits.epochs is not None:
            if self.epochs >= limits.epochs * (1.0 - WHOLE):
                return 1.0, "epochs"
            whole = epochs >= limits.epochs * (1.0 - WHOLE)
            shares.append(1.0 if whole else (epochs - begin.epochs) / (limits.epochs - begin.epochs))
        return begin.progress + (1.0 - begin.progress) * max(shares), None

    def steps_left(self, limits: Limits) -> float | None:
        """Steps until the first of these limits is reached, by the mean step so far; None where unknown."""
        if not self.steps:
            return None if limits.steps is None else float(limits.steps)
        left: list[float] = []
        if limits.steps is not None:
            left.append(limits.steps - self.steps)
        if limits.tokens is not None:
            left.append((limits.tokens - self.tokens) // (self.tokens / self.steps))
        if limits.epochs is not None and self.epochs:
            left.append(math.ceil((limits.epochs - self.epochs) / (self.epochs / self.steps) - WHOLE))
        return max(0.0, min(left)) if left else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; one without an anchor is of a run whose budget never changed."""
        self.steps = int(state["steps"])
        self.tokens = int(state["tokens"])
        self.epochs = float(state["epochs"])
        self.anchor = Anchor(**state.get("anchor", {}))
