"""Warm-up: how far the rate has risen, from progress and from the number of steps.

With progress driven by time, one slow first step (compilation, cold caches) can swallow a warm-up of 3 %
whole. So a share of the budget is only half of the rule: the rise also takes at least `MIN_STEPS` optimizer
steps, or a tenth of the budget where the run is so short that ten steps would be more than that; and no
single step raises the rate by more than a third of the peak, whatever happened to the clock.
"""

from dataclasses import dataclass

MIN_STEPS = 10
MAX_SHARE = 0.1
MAX_RISE = 1 / 3


@dataclass(frozen=True)
class Warmup:
    """A rise from 0 to 1 over a share of the budget, over a number of steps, or none (both zero)."""

    share: float = 0.0
    steps: int = 0

    @classmethod
    def from_recipe(cls, warmup_steps: float) -> "Warmup":
        """`schedule.warmup_steps`: below 1 a share of the budget, from 1 a number of steps."""
        return cls(share=warmup_steps) if warmup_steps < 1 else cls(steps=round(warmup_steps))

    def level(self, progress: float, step: int, before: float) -> float:
        """Share of the peak, in (0, 1], for the step number `step` (from 0) that ends at `progress`.

        before: the level of the step before, 0 at the first. The level never falls, is 1 at the end of the
        warm-up and stays there.
        """
        if before >= 1.0 or (self.share == 0 and self.steps == 0):
            return 1.0
        if self.steps:
            return max(before, min((step + 1) / self.steps, 1.0))
        by_steps = max((step + 1) / MIN_STEPS, progress / MAX_SHARE)
        by_share = progress / self.share if progress > 0 else by_steps
        return max(before, min(by_share, by_steps, before + MAX_RISE, 1.0))


NO_WARMUP = Warmup()
