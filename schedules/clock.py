"""The Clock: the only thing that knows time, and the one progress that schedule, stop test and report read.

Progress is the share of the training that the budget buys, at the end of the step about to run. For counted
limits it is `(used + this step) / limit`, so a run limited by steps, tokens or epochs depends on those alone
and repeats to the bit. For time, money and energy it is

    x = (done + e) / (done + e + left)

with `done` the seconds trained so far, `e` the predicted seconds of this step and `left` the seconds of
training that will still fit: to the deadline, less the reserve for what comes after the last step, less
evaluations and saves that fall due before it. Load time and evaluations are paid from `left`, so they cost
training but never make the rate jump, and the last step that fits ends at x = 1. With several limits x is
the largest of them.

Why the end of the step: whatever the profile and however few the steps, the first step has a rate above zero
and the last one lands on the floor. Against the usual count of steps it is the same sequence, one call
earlier: peers spend their first step at rate zero, we our last.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..recipes.quantities import Every
from .cadence import Cadence
from .estimates import Durations, StepTime
from .limits import Limits
from .now import deadline_now
from .permit import StepPermit
from .refusals import already_spent, no_step_fits
from .warmup import NO_WARMUP, Warmup

SAFETY = 0.002
"""Share of the deadline kept free for noise in the last step, the last save and the export."""
LAST_STEP_DOUBT = 0.25
"""The next step must fit with this much to spare, or this one is taken for the last and lands at x = 1."""
_WHOLE = 1e-9


@dataclass
class _Running:
    permit: StepPermit
    epochs: float
    began: float
    spent: float


class Clock:
    """One progress, one stop test, one account of what was used.

    limits: what may be spent. started: when the process started, on the axis of `now`; everything since then
    counts. now: seconds, see `deadline_now`. joules: energy since the process started, or None where it
    cannot be measured. reserve_guess: kinds of work after the last step ("eval", "save", "export", ...) with
    guessed seconds; measured ones replace the guesses. seconds_per_token_guess: speed before the second
    step. warmup: of the schedule.

    With several processes one Clock decides: send its permits, and give them to the others' `apply`.
    Raises UserError when a limit cannot be measured on this machine.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        started: float,
        now: Callable[[], float] = deadline_now,
        joules: Callable[[], float | None] = lambda: None,
        reserve_guess: Mapping[str, float] | None = None,
        seconds_per_token_guess: float | None = None,
        warmup: Warmup = NO_WARMUP,
    ) -> None:
        limits.check(energy_measured=joules() is not None)
        self.limits = limits
        self.steps = 0
        self.tokens = 0
        self.epochs = 0.0
        self.progress = 0.0
        self.stop_reason: str | None = None
        self.durations = Durations(dict(reserve_guess or {}))
        self.step_time = StepTime(guess=seconds_per_token_guess)
        self._started, self._now, self._read_joules, self._warmup = started, now, joules, warmup
        self._here = 0.0
        self._carried_seconds = 0.0
        self._carried_joules = 0.0
        self._level = 0.0
        self._warm_at: float | None = None
        self._cadences: list[Cadence] = []
        self._open: list[float] = []
        self._spent = 0.0
        self._landed: set[str] = set()
        self._running: _Running | None = None
        self._finished: tuple[float, float] | None = None
        self._power_since = (self.seconds, self.joules or 0.0)

    # What was used

    @property
    def seconds(self) -> float:
        """Since the start of the process, and in earlier processes of this run. Never runs backwards."""
        self._here = max(self._here, self._now() - self._started)
        return self._carried_seconds + self._here

    @property
    def joules(self) -> float | None:
        """Energy used by this run, or None where it cannot be measured."""
        here = self._read_joules()
        return None if here is None else self._carried_joules + here

    @property
    def cost(self) -> float | None:
        """Money spent at the price given, or None without a price. Every second of the process is billed."""
        price = self.limits.price_per_hour
        return None if price is None else self.seconds / 3600.0 * price

    def used(self) -> dict[str, dict[str, float | int | None]]:
        """For each limit what was given and what was used; None for what was not given or not measured."""
        limits = self.limits
        return {
            "time": {"given": limits.seconds, "used": self.seconds},
            "cost": {"given": limits.cost, "used": self.cost},
            "energy": {"given": limits.joules, "used": self.joules},
            "tokens": {"given": limits.tokens, "used": self.tokens},
            "steps": {"given": limits.steps, "used": self.steps},
            "epochs": {"given": limits.epochs, "used": self.epochs},
        }

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Measure what is not a step: "load", "data", "eval", "samples", "save", "export", "report".

        Later ones of the same kind, and the reserve, are predicted from it. An inner `spent` is not counted
        in the outer one. What ends in an exception is counted but not learned from.
        """
        began, whole = self.seconds, False
        self._open.append(0.0)
        try:
            yield
            whole = True
        finally:
            total = self.seconds - began
            own = total - self._open.pop()
            if self._open:
                self._open[-1] += total
            else:
                self._spent += total
            self.durations.add(kind, own, whole=whole)
            if self.stop_reason is not None:
                self._landed.add(kind)

    # What is left

    @property
    def reserve(self) -> float:
        """Seconds kept for what must still happen after the last step."""
        return sum(self.durations.expected(kind) for kind in self.durations.guess if kind not in self._landed)

    def remaining_seconds(self) -> float | None:
        """Until the first of time, cost and energy runs out at the present power; None when none is given."""
        deadline = self._deadline()
        return None if deadline is None else max(0.0, deadline[0] - self.seconds)

    def finish_in(self) -> float | None:
        """Seconds until the last file is written, counted limits at the measured speed; None when unknown."""
        if self.stop_reason is not None:
            return self.reserve
        remaining = self.remaining_seconds()
        ends = [] if remaining is None else [remaining]
        steps = self._counted_steps_left()
        if steps is not None and self.step_time.seconds_per_token is not None and self.steps:
            step = self.step_time.predict(self.tokens / self.steps)
            end = steps * step
            ends.append(end + self._pending(steps, self.seconds + end) + self.reserve)
        return min(ends, default=None)

    def _deadline(self) -> tuple[float, str] | None:
        """When, on the axis of `seconds`, the first of time, cost and energy runs out, and which."""
        ends: list[tuple[float, str]] = []
        if self.limits.seconds is not None:
            ends.append((self.limits.seconds, "time"))
        if self.limits.cost_seconds is not None:
            ends.append((self.limits.cost_seconds, "cost"))
        watts, joules = self._watts(), self.joules
        if self.limits.joules is not None and joules is not None:
            left = self.limits.joules - joules
            if left <= 0:
                ends.append((self.seconds, "energy"))
            elif watts:
                ends.append((self.seconds + left / watts, "energy"))
        return min(ends, default=None)

    def _watts(self) -> float | None:
        """Mean power since the first step; counters need a second at least."""
        joules, (since, before) = self.joules, self._power_since
        elapsed = self.seconds - since
        return None if joules is None or elapsed < 1.0 else (joules - before) / elapsed

    def _counted_steps_left(self) -> float | None:
        if not self.steps:
            return None if self.limits.steps is None else float(self.limits.steps)
        left: list[float] = []
        if self.limits.steps is not None:
            left.append(self.limits.steps - self.steps)
        if self.limits.tokens is not None:
            left.append((self.limits.tokens - self.tokens) // (self.tokens / self.steps))
        if self.limits.epochs is not None and self.epochs:
            left.append(math.ceil((self.limits.epochs - self.epochs) / (self.epochs / self.steps) - _WHOLE))
        return max(0.0, min(left)) if left else None

    def _pending(self, steps: float, end: float) -> float:
        """Seconds of the events due in the next `steps` steps, before `end`; none after the last."""
        between = max(0, math.floor(steps) - 1)
        until = self.steps + math.floor(steps)
        return sum(
            min(cadence.count(until, 1.0, end), between) * self._event_seconds(cadence)
            for cadence in self._cadences
        )

    def _event_seconds(self, cadence: Cadence) -> float:
        return sum(self.durations.expected(kind) for kind in cadence.kinds)

    # Events between steps

    def cadence(self, every: Every, *kinds: str) -> Cadence:
        """A recurring event whose cost, the expected seconds of `kinds`, is planned for from now on."""
        cadence = Cadence(every, kinds)
        self._cadences.append(cadence)
        return cadence

    def should_run(self, cadence: Cadence) -> bool:
        """Whether the event is due now, after a finished step; true once. Not when it belongs to the landing.

        An event after which no further step would fit is left out: the landing does the same work anyway.
        """
        at = (self.steps, self.progress, self.seconds)
        if not cadence.due(*at):
            return False
        cadence.fired(*at)
        if self.stop_reason is not None or self.progress >= 1.0 or self._counted_steps_left() == 0:
            return False
        deadline = self._deadline()
        if deadline is None:
            return True
        step = self.step_time.predict(self.tokens / self.steps) if self.steps else 0.0
        return self.seconds + self._event_seconds(cadence) + step <= self._last_end(deadline[0])

    # Steps

    def plan_step(self, tokens: int, epochs: float = 0.0, *, next_tokens: int | None = None) -> StepPermit:
        """Whether the next step may run, and where in the schedule it stands.

        tokens: of the step, over all processes. epochs: passes over the rows when it ends, needed for a
        limit in epochs. next_tokens: of the step after it, where known (else taken to be about as large).
        Raises BudgetError when not even the first step of the run fits.
        """
        began = self.seconds
        self._learn_overhead(began)
        if not self.steps and self.step_time.first is None:
            self._power_since = (began, self.joules or 0.0)
        counted, stop = self._counted(tokens, epochs, next_tokens)
        deadline = self._deadline()
        step = self.step_time.predict(tokens)
        timed = 0.0
        if deadline is not None:
            end, name = deadline
            room = self._last_end(end) - began - step
            if room < 0:
                stop = stop or name
            timed = self._timed(step, room, began, next_tokens)
        if stop is not None:
            if not self.steps:
                raise no_step_fits(
                    self.limits,
                    stop,
                    seconds=began,
                    step=step,
                    tokens=tokens,
                    durations=self.durations,
                    reserve=self.reserve,
                )
            self.stop_reason = stop
            return StepPermit(False, self.progress, self._level, self._annealed(self.progress), stop)
        progress = min(1.0, max(self.progress, counted, timed))
        level = self._warmup.level(progress, self.steps, self._level)
        permit = StepPermit(True, progress, level, self._annealed(progress, level))
        self._running = _Running(permit, epochs, began, self._spent)
        return permit

    def apply(self, permit: StepPermit, epochs: float = 0.0) -> StepPermit:
        """Take over the decision of another process for the step about to run; returns it."""
        if permit.go:
            self._running = _Running(permit, epochs, self.seconds, self._spent)
        else:
            self.stop_reason = permit.stop_reason
        return permit

    def stop(self, reason: str) -> None:
        """End the run here for a reason that is no limit (a signal, early stopping): the landing begins."""
        self.stop_reason = self.stop_reason or reason

    def finish_step(self, seconds: float, tokens: int, epochs: float | None = None) -> None:
        """Count the step that was permitted.

        seconds: measured by the caller; when more time has passed since the permit (waiting for data), that
        counts. epochs: as in plan_step; None takes what was given there.
        """
        running = self._running
        if running is None:
            raise RuntimeError("finish_step without a step: call plan_step, or apply, first")
        ended = self.seconds
        self.step_time.add(max(seconds, ended - running.began - (self._spent - running.spent)), tokens)
        self._finished = (ended, self._spent)
        self._running = None
        self.steps += 1
        self.tokens += tokens
        self.epochs = running.epochs if epochs is None else epochs
        self.progress = running.permit.progress
        self._level = running.permit.warmup
        if self._level >= 1.0 and self._warm_at is None:
            self._warm_at = self._warm_end(self.progress)

    def _learn_overhead(self, now: float) -> None:
        if self._finished is not None:
            ended, spent = self._finished
            self.step_time.overhead.add(max(0.0, now - ended - (self._spent - spent)))
            self._finished = None

    def _last_end(self, deadline: float) -> float:
        """When the last step must have ended."""
        return deadline * (1.0 - SAFETY) - self.reserve

    def _counted(self, tokens: int, epochs: float, next_tokens: int | None) -> tuple[float, str | None]:
        """Progress by the counted limits at the end of the step, and the limit that forbids it."""
        limits, progress = self.limits, [0.0]
        if limits.steps is not None:
            if self.steps >= limits.steps:
                return 1.0, "steps"
            progress.append((self.steps + 1) / limits.steps)
        if limits.tokens is not None:
            after = self.tokens + tokens
            if after > limits.tokens:
                return 1.0, "tokens"
            last = after + (next_tokens or tokens) > limits.tokens
            progress.append(1.0 if last else after / limits.tokens)
        if limits.epochs is not None:
            if self.epochs >= limits.epochs * (1.0 - _WHOLE):
                return 1.0, "epochs"
            whole = epochs >= limits.epochs * (1.0 - _WHOLE)
            progress.append(1.0 if whole else epochs / limits.epochs)
        return max(progress), None

    def _timed(self, step: float, room: float, now: float, next_tokens: int | None) -> float:
        """Progress by the clock at the end of a step of `step` seconds, after which `room` seconds are
        left.
        """
        mean = self.tokens / self.steps if self.steps else next_tokens or 0
        following = self.step_time.predict(mean if next_tokens is None else next_tokens)
        if room <= following * (1.0 + LAST_STEP_DOUBT):
            return 1.0
        left = room
        if following:
            # Events take from the room, and how many there will be depends on how many steps fit beside them.
            end = now + step + room
            fits = bisect.bisect_right(
                range(math.ceil(room / following)),
                room,
                key=lambda more: (1 + more) * following + self._pending(2 + more, end),
            )
            left = max(0.0, room - self._pending(1 + fits, end) - following)
        done = self.step_time.trained_seconds(self.tokens, self.steps) + step
        return done / (done + left) if done else 0.0

    def _warm_end(self, progress: float) -> float:
        return 0.0 if self._warmup == NO_WARMUP else progress

    def _annealed(self, progress: float, level: float = 1.0) -> float:
        """Progress after warm-up. The only step of a one-step run is not annealed away."""
        if progress >= 1.0:
            return 1.0 if self.steps else 0.0
        if level < 1.0:
            return 0.0
        start = self._warm_end(progress) if self._warm_at is None else self._warm_at
        return (progress - start) / (1.0 - start)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Amounts, as plain values for JSON; no moment of any clock is in it."""
        return {
            "seconds": self.seconds,
            "joules": self.joules,
            "steps": self.steps,
            "tokens": self.tokens,
            "epochs": self.epochs,
            "progress": self.progress,
            "warmup_level": self._level,
            "warmup_ended_at": self._warm_at,
            "step_time": self.step_time.state_dict(),
            "durations": self.durations.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, lost_seconds: float = 0.0) -> None:
        """Go on from what an earlier process of the run had used; the limits stay those of this recipe.

        lost_seconds: spent by that process after it wrote the state and before it ended, where known. The
        time between the processes is nobody's. A larger budget than before holds progress until it is caught
        up with. Raises BudgetError when the run has already used more than it is now given.
        """
        self._carried_seconds = float(state["seconds"]) + lost_seconds
        self._carried_joules = float(state["joules"] or 0.0)
        self.steps = int(state["steps"])
        self.tokens = int(state["tokens"])
        self.epochs = float(state["epochs"])
        self.progress = float(state["progress"])
        self._level = float(state["warmup_level"])
        ended = state["warmup_ended_at"]
        self._warm_at = None if ended is None else float(ended)
        self.step_time.load_state_dict(state["step_time"])
        self.durations.load_state_dict(state["durations"])
        self._power_since = (self.seconds, self.joules or 0.0)
        used = {"time": self._carried_seconds, "energy": self._carried_joules, "tokens": self.tokens}
        used |= {"steps": self.steps, "epochs": self.epochs}
        if self.limits.price_per_hour is not None:
            used["cost"] = self._carried_seconds / 3600.0 * self.limits.price_per_hour
        refusal = already_spent(self.limits, used)
        if refusal is not None:
            raise refusal
