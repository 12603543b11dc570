"""What a run has used of its budget, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from .account import Account
from .ahead import Ahead
from .counted import Counted
from .limits import Limits

SAFETY = 0.002
"""Share of the budget kept free for noise in the last step, the last save and the export."""
TOLERANCE = 0.005
"""Share of the budget, or half a second, by which a landing may run over before work is left out for it."""
ANSWERS = "samples"
"""What can be cut to half where the rest of the landing takes too long."""


@dataclass
class Piece:
    """Work that is being measured. size: what later ones are predicted by; whoever does less corrects it."""

    size: float


class Spending:
    """The part of the Clock that decides nothing: it measures and adds up.

    limits: in all, with what was used before this leg.
    """

    def __init__(self, limits: Limits, account: Account, ahead: Ahead) -> None:
        self.limits = limits
        self.stop_reason: str | None = None
        self.durations = ahead.durations
        self.step_time = ahead.step_time
        self._account, self._ahead, self._counted = account, ahead, Counted()
        self._before: Mapping[str, float | int | None] = {}
        self._open: list[float] = []
        self._spent = 0.0

    # What was used

    @property
    def seconds(self) -> float:
        """Since the start of the process, and in earlier processes of this run. Never runs backwards."""
        return self._account.seconds

    @property
    def joules(self) -> float | None:
        """Energy used by this run, or None where it was not measured all the time."""
        return self._account.joules

    @property
    def energy_source(self) -> str | None:
        """The counters that the energy was read from, such as "GPU 0 (NVML), CPU package 0 (RAPL)"."""
        return self._account.source

    @property
    def cost(self) -> float | None:
        """Money spent, each second at the price of its time, or None without a price."""
        return self._account.cost

    @property
    def steps(self) -> int:
        """Finished steps, over all legs."""
        return self._counted.steps

    @property
    def tokens(self) -> int:
        """Tokens of the finished steps."""
        return self._counted.tokens

    @property
    def epochs(self) -> float:
        """Passes over the rows in the finished steps."""
        return self._counted.epochs

    def _amounts(self) -> dict[str, float | int | None]:
        counted = self._counted
        return {
            "time": self.seconds,
            "cost": self.cost,
            "energy": self.joules,
            "tokens": counted.tokens,
            "steps": counted.steps,
            "epochs": counted.epochs,
        }

    def used(self) -> dict[str, dict[str, float | int | None]]:
        """For each limit what was given and what was used; None for what was not given or not measured."""
        given = self.limits.amounts()
        return {name: {"given": given[name], "used": used} for name, used in self._amounts().items()}

    @contextmanager
    def spent(self, kind: str, size: float = 1.0, *, at_most: float | None = None) -> Iterator[Piece]:
        """Measure what is not a step: "load", "data", "eval", "samples", "save", "export", "report".

        Later ones of the same kind, and the reserve, are predicted from it, in proportion to `size` (rows of
        an evaluation); the landing's is as large as the largest. at_most: seconds that are kept for the next
        one at most, where it can be cut short. An inner `spent` is not counted in the outer
        one. What ends in an exception is counted but not learned from.
        """
        began, whole, piece = self.seconds, False, Piece(size)
        self._open.append(0.0)
        try:
            yield piece
            whole = True
        finally:
            total = self.seconds - began
            own = total - self._open.pop()
            if self._open:
                self._open[-1] += total
            else:
                self._spent += total
            self.durations.add(kind, own, size=piece.size, whole=whole, at_most=at_most)
            if self.stop_reason is not None:
                self._ahead.landed.add(kind)

    # What is left

    @property
    def reserve(self) -> float:
        """Seconds kept for what must still happen after the last step."""
        return self._ahead.reserve

    def remaining_seconds(self) -> float | None:
        """Until the first of time, cost and energy runs out at the present power; None when none is given."""
        deadline = self._deadline()
        return None if deadline is None else max(0.0, deadline[0] - self.seconds)

    def rest_fits(self, kind: str, taken: float, rest: float) -> bool:
        """Whether the landing has `rest` seconds for the second part of a piece whose first took `taken`.

        Always before the landing, and without a limit that time counts for. How much slower than expected the
        first part was, all that follows is taken to be.
        """
        deadline = self._deadline()
        if self.stop_reason is None or deadline is None:
            return True
        others = self.reserve - self.durations.expected(kind)
        if ANSWERS in self.durations.guess and ANSWERS not in self._ahead.landed:
            others -= self.durations.expected(ANSWERS) / 2
        others *= max(1.0, (taken + rest) / max(self.durations.unhurried(kind), 1e-9))
        tolerance = max(0.5, self._safety(deadline[0]) * TOLERANCE / SAFETY)
        return self.seconds + rest + others <= deadline[0] + tolerance

    def finish_in(self) -> float | None:
        """Seconds until the last file is written, counted limits at the measured speed; None when unknown."""
        if self.stop_reason is not None:
            return self.reserve
        remaining = self.remaining_seconds()
        ends = [] if remaining is None else [remaining]
        steps = self._counted.steps_left(self.limits)
        if steps is not None and self.step_time.seconds_per_token is not None and self.steps:
            end = steps * self.step_time.predict(self.tokens / self.steps)
            ends.append(end + self._ahead.events(self.steps, steps, self.seconds + end) + self.reserve)
        return min(ends, default=None)

    def _deadline(self) -> tuple[float, str] | None:
        """When, on the axis of `seconds`, the first of time, cost and energy runs out, and which."""
        ends: list[tuple[float, str]] = []
        now, limits = self.seconds, self.limits
        if limits.seconds is not None:
            ends.append((limits.seconds, "time"))
        if limits.cost is not None:
            ends.append((now + self._account.seconds_for(limits.cost - (self.cost or 0.0)), "cost"))
        joules, watts = self.joules, self._account.watts
        if limits.joules is not None and joules is not None:
            left = limits.joules - joules
            if left <= 0:
                ends.append((now, "energy"))
            elif watts:
                ends.append((now + left / watts, "energy"))
        return min(ends, default=None)

    def _last_end(self, deadline: float) -> float:
        """When the last step must have ended."""
        return deadline - self._safety(deadline) - self.reserve

    def _safety(self, deadline: float) -> float:
        return SAFETY * (deadline - float(self._before.get("time") or 0.0))
