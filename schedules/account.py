"""What a run has used of time, money and energy, in this process and in earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

LEAST_SECONDS = 1.0
"""Power is not known from less than this: counters move in steps of about 0.1 s."""


class Account:
    """Amounts that only grow. Money is billed piece by piece, each second at the price that held then.

    started: when the process started, on the axis of `now`. joules: energy since then, None where it is not
    measured. source: the counters' names.
    """

    def __init__(
        self,
        *,
        started: float,
        now: Callable[[], float],
        joules: Callable[[], float | None],
        price_per_hour: float | None,
        source: str | None,
    ) -> None:
        self._started, self._now, self._read_joules = started, now, joules
        self._here = 0.0
        self._carried_seconds = 0.0
        self._carried_joules: float | None = 0.0
        self._price = price_per_hour
        self._billed = 0.0
        self._unbilled_from = 0.0
        self._source, self._sources_before = source, ""
        self._power_since = (self.seconds, self.joules or 0.0)

    @property
    def seconds(self) -> float:
        """Since the start of the process, and in earlier processes of this run. Never runs backwards."""
        self._here = max(self._here, self._now() - self._started)
        return self._carried_seconds + self._here

    @property
    def joules(self) -> float | None:
        """Energy used by this run; None where it, or an earlier process's, was not measured."""
        here = self._read_joules()
        return None if here is None or self._carried_joules is None else self._carried_joules + here

    @property
    def cost(self) -> float | None:
        """Money spent, or None without a price. Every second of the process is billed."""
        if self._price is None:
            return None
        return self._billed + (self.seconds - self._unbilled_from) / 3600.0 * self._price

    @property
    def source(self) -> str | None:
        """What the energy was read from; what earlier processes read, where that was something else."""
        if self._source is None or self._sources_before in ("", self._source):
            return self._source
        return f"{self._source}; before: {self._sources_before}"

    def set_price(self, price_per_hour: float | None) -> None:
        """From now on an hour costs this. Seconds before any price was known cost the first one given."""
        if self._price is not None and price_per_hour != self._price:
            self._billed, self._unbilled_from = self.cost or 0.0, self.seconds
        self._price = price_per_hour if price_per_hour is not None else self._price

    def seconds_for(self, money: float) -> float:
        """Seconds that `money` more buys at the present price."""
        assert self._price is not None
        return money / self._price * 3600.0

    def mark_power(self) -> None:
        """The mean power counts from here."""
        self._power_since = (self.seconds, self.joules or 0.0)

    @property
    def watts(self) -> float | None:
        """Mean power since the mark, None before there is one to speak of."""
        joules, (since, before) = self.joules, self._power_since
        elapsed = self.seconds - since
        return None if joules is None or elapsed < LEAST_SECONDS else (joules - before) / elapsed

    def state_dict(self) -> dict[str, Any]:
        """Amounts, as plain values."""
        return {
            "seconds": self.seconds,
            "joules": self.joules,
            "cost": self.cost,
            "price_per_hour": self._price,
            "energy_source": self._source,
        }

    def load_state_dict(self, state: Mapping[str, Any], lost_seconds: float) -> None:
        """Go on from what earlier processes used, billed at their price; call it once or again from anew.

        lost_seconds: that the last of them used after it wrote the state.
        """
        before = float(state["seconds"]) + lost_seconds
        price, cost = state.get("price_per_hour"), state.get("cost")
        self._carried_seconds = before
        self._carried_joules = None if state["joules"] is None else float(state["joules"])
        self._sources_before = state.get("energy_source") or ""
        self._billed, self._unbilled_from = 0.0, 0.0
        if cost is not None and price is not None:
            self._billed = float(cost) + lost_seconds / 3600.0 * float(price)
            self._unbilled_from = before
            self._price = self._price if self._price is not None else float(price)
        self.mark_power()
