"""Stages: warm-up and profile run once over each.

A stage is a part of the budget, [start, end] of progress; most runs are one stage, [0, 1]. Inside it

    u = (x - start) / (end - start)

takes the place of progress x for the warm-up and for the profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .counted import WHOLE
from .warmup import NO_WARMUP, Warmup


@dataclass
class Stage:
    """steps: finished in it. level: of the warm-up after the last of them. warm_at: u where it was warm."""

    start: float = 0.0
    end: float = 1.0
    steps: int = 0
    level: float = 0.0
    warm_at: float | None = None

    def place(self, progress: float) -> float:
        """u in [0, 1]; 1 from the end on."""
        if progress >= self.end - WHOLE:
            return 1.0
        return (progress - self.start) / (self.end - self.start)

    def level_at(self, progress: float, warmup: Warmup) -> float:
        """Level of the warm-up for a step that ends at `progress`."""
        return warmup.level(self.place(progress), self.steps, self.level)

    def annealed(self, progress: float, warmup: Warmup, level: float = 1.0) -> float:
        """Progress through the profile, after warm-up, for a step that ends at `progress`.

        The only step of a one-step stage is not annealed away.
        """
        place = self.place(progress)
        if place >= 1.0:
            return 1.0 if self.steps else 0.0
        if level < 1.0:
            return 0.0
        start = self.warm_at
        if start is None:
            start = 0.0 if warmup == NO_WARMUP else place
        return (place - start) / (1.0 - start)

    def finish_step(self, progress: float, level: float, warmup: Warmup) -> None:
        """Count a finished step."""
        self.steps += 1
        self.level = level
        if level >= 1.0 and self.warm_at is None:
            self.warm_at = 0.0 if warmup == NO_WARMUP else self.place(progress)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Stage:
        """Of a Clock's state; one that knows no stages is of a run with one."""
        if "stage" in state:
            return cls(**state["stage"])
        warm_at = state["warmup_ended_at"]
        return cls(
            steps=int(state["steps"]),
            level=float(state["warmup_level"]),
            warm_at=None if warm_at is None else float(warm_at),
        )
