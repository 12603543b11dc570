"""What may be spent: the limits of a run, each None when it is not given."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..recipes.errors import UserError
from ..recipes.running import BudgetConfig


@dataclass(frozen=True)
class Limits:
    """Any of six limits; the first to run out ends the run. price_per_hour is no limit, it gives `cost` its
    time.

    seconds: wall clock. cost: money, in the currency of price_per_hour. joules: energy. tokens: tokens seen,
    prompts included. steps: optimizer steps. epochs: passes over the training rows.
    """

    seconds: float | None = None
    cost: float | None = None
    price_per_hour: float | None = None
    joules: float | None = None
    tokens: int | None = None
    steps: int | None = None
    epochs: float | None = None

    @classmethod
    def from_recipe(cls, budget: BudgetConfig) -> Limits:
        """The limits of the recipe's `budget` section, as plain numbers."""
        return cls(
            seconds=None if budget.time is None else float(budget.time),
            cost=None if budget.cost is None else float(budget.cost),
            price_per_hour=None if budget.price is None else float(budget.price),
            joules=None if budget.energy is None else float(budget.energy),
            tokens=None if budget.tokens is None else int(budget.tokens),
            steps=None if budget.steps is None else int(budget.steps),
            epochs=budget.epochs,
        )

    def check(self, *, energy_measured: bool) -> None:
        """Raise UserError when nothing limits the run, or a limit cannot be measured on this machine."""
        limits = [getattr(self, f.name) for f in fields(self) if f.name != "price_per_hour"]
        if all(limit is None for limit in limits):
            raise UserError(
                "budget  nothing limits this run; give one of time, cost, energy, tokens, steps, epochs"
                "   e.g. budget.time=2h"
            )
        if self.cost is not None and self.price_per_hour is None:
            raise UserError(
                "budget.cost  cannot be measured without what the machine costs an hour"
                '   Give it: budget.price="2.49 USD/h"'
            )
        if self.joules is not None and not energy_measured:
            raise UserError(
                "budget.energy  cannot be measured on this machine: no NVIDIA energy counter and no readable "
                "/sys/class/powercap counter   Use budget.time instead, or see: shoestring doctor"
            )

    @property
    def cost_seconds(self) -> float | None:
        """Seconds that `cost` buys, or None."""
        if self.cost is None or self.price_per_hour is None:
            return None
        return self.cost / self.price_per_hour * 3600.0
