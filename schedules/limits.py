"""What may be spent: the limits of a run, each None when it is not given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
        if all(limit is None for limit in self.amounts().values()):
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

    def amounts(self) -> dict[str, float | int | None]:
        """By the recipe's names; the price is none of them."""
        return {
            "time": self.seconds,
            "cost": self.cost,
            "energy": self.joules,
            "tokens": self.tokens,
            "steps": self.steps,
            "epochs": self.epochs,
        }

    def beyond(self, used: Mapping[str, float | int | None]) -> Limits:
        """The same limits counted from zero, when they are given on top of what was `used`."""

        def more(name: str) -> Any:
            given, before = self.amounts()[name], used.get(name)
            return given if given is None or not before else given + before

        return replace(
            self,
            seconds=more("time"),
            cost=more("cost"),
            joules=more("energy"),
            tokens=more("tokens"),
            steps=more("steps"),
            epochs=more("epochs"),
        )

    def same_but_price(self, other: Limits) -> bool:
        """Whether both end a run in the same way: a price alone, with no limit of money, changes no end."""
        price = self.price_per_hour if self.cost is None else other.price_per_hour
        return replace(other, price_per_hour=price) == self

    def changes(self, new: Limits) -> str:
        """One line on what is different in `new`."""
        before, after = self.amounts(), new.amounts()
        before["price"], after["price"] = self.price_per_hour, new.price_per_hour
        parts = [
            f"{name} {_shown(name, before[name])} -> {_shown(name, after[name])}"
            for name in before
            if before[name] != after[name]
        ]
        return f"budget: {', '.join(parts) or 'unchanged'}"

    @property
    def cost_seconds(self) -> float | None:
        """Seconds that `cost` buys, or None."""
        if self.cost is None or self.price_per_hour is None:
            return None
        return self.cost / self.price_per_hour * 3600.0


def _shown(name: str, amount: float | int | None) -> str:
    unit = {"time": " s", "energy": " J", "price": " an hour"}.get(name, "")
    return "none" if amount is None else f"{amount:.12g}{unit}"
