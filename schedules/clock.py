"""The Clock: the only thing that knows time, and the one progress that schedule, stop test and report read.

Progress is the share of the training that the budget buys, at the end of the step about to run. Counted
limits (counted.py) give it from counts alone, so such a run repeats to the bit. Time, money and energy give

    x = x' + (1 - x') e / (e + left)

with `x'` the progress so far, `e` the predicted seconds of this step and `left` the seconds of training that
will still fit after it: to the deadline, less the reserve for what comes after the last step, less
evaluations and saves that fall due before it. Whatever was expected wrongly, a slow start, a stall, a new
budget, changes how fast progress goes on and never where it is: the rate does not jump, and the last step
that fits ends at x = 1. With several limits x is the largest of them.

Why the end of the step: whatever the profile and however few the steps, the first step has a rate above zero
and the last one lands on the floor. Against the usual count of steps it is the same sequence, one call
earlier: peers spend their first step at rate zero, we our last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ..recipes.quantities import Every
from .account import Account
from .ahead import LAST_STEP_DOUBT, Ahead
from .cadence import Cadence
from .limits import Limits
from .now import deadline_now
from .permit import Running, StepPermit
from .refusals import already_spent, energy_unknown, no_step_fits
from .spending import Spending
from .stage import Stage
from .warmup import NO_WARMUP, Warmup


class Clock(Spending):
    """One progress, one stop test, one account of what was used.

    limits: what may be spent; after `extend`, by the present leg alone. started: when the process started, on
    the axis of `now`; everything since then counts. now: seconds, see `deadline_now`. joules: energy since
    the process started, or None where it cannot be measured; energy_source names its counters.
    reserve_guess: kinds of work after the last step ("eval", "save", "export", ...) with guessed seconds;
    measured ones replace the guesses. least_sizes: of those that the landing can make smaller, the size
    (rows) that is done in any case. seconds_per_token_guess: speed before the second step. warmup: of the
    schedule.

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
        energy_source: str | None = None,
        reserve_guess: Mapping[str, float] | None = None,
        least_sizes: Mapping[str, float] | None = None,
        seconds_per_token_guess: float | None = None,
        warmup: Warmup = NO_WARMUP,
    ) -> None:
        limits.check(energy_measured=joules() is not None)
        account = Account(
            started=started,
            now=now,
            joules=joules,
            price_per_hour=limits.price_per_hour,
            source=energy_source,
        )
        super().__init__(limits, account, Ahead.of(reserve_guess, least_sizes, seconds_per_token_guess))
        self.leg = 0
        self.progress = 0.0
        self._given = limits
        self._leg_began_at = 0
        self._warmup = warmup
        self._stage = Stage()
        self._running: Running | None = None
        self._finished: tuple[float, float] | None = None

    # Events between steps

    def cadence(self, every: Every, *kinds: str) -> Cadence:
        """A recurring event whose cost, the expected seconds of `kinds`, is planned for from now on."""
        cadence = Cadence(every, kinds, leg=self.leg)
        self._ahead.cadences.append(cadence)
        return cadence

    def should_run(self, cadence: Cadence) -> bool:
        """Whether the event is due now, after a finished step; true once. Not when it belongs to the landing.

        An event after which no further step would fit is left out: the landing does the same work anyway.
        """
        at = (self.steps, self.progress, self.seconds)
        if not cadence.due(*at):
            return False
        cadence.fired(*at)
        if self.stop_reason is not None or self.progress >= 1.0 or self._counted.steps_left(self.limits) == 0:
            return False
        deadline = self._deadline()
        if deadline is None:
            return True
        step = self.step_time.predict(self.tokens / self.steps) if self.steps else 0.0
        after = self.seconds + self._ahead.event(cadence) + step * (1.0 + LAST_STEP_DOUBT)
        return after <= self._last_end(deadline[0])

    # Steps

    def plan_step(self, tokens: int, epochs: float = 0.0, *, next_tokens: int | None = None) -> StepPermit:
        """Whether the next step may run, and where in the schedule it stands.

        tokens: of the step, over all processes. epochs: passes over the rows when it ends, needed for a
        limit in epochs. next_tokens: of the step after it, where known (else taken to be about as large).
        Raises BudgetError when not even the first step of the run, or of its leg, fits.
        """
        began = self.seconds
        self._learn_overhead(began)
        if not self.steps and self.step_time.first is None:
            self._account.mark_power()
        counted, stop = self._counted.progress_after(self.limits, tokens, epochs, next_tokens)
        deadline = self._deadline()
        step = self.step_time.predict(tokens)
        timed = 0.0
        if deadline is not None:
            end, name = deadline
            room = self._last_end(end) - began - step
            # A run that has not landed yet may use what is kept for noise, for a last step at the floor.
            if room + (self._safety(end) if 0.0 < self.progress < 1.0 else 0.0) < 0:
                stop = stop or name
            usual = self.tokens / self.steps if self.steps else tokens
            following = self.step_time.predict(next_tokens or usual)
            timed = self._timed(step, room, following, began + step + room)
        if stop is not None:
            if self.steps == self._leg_began_at:
                raise no_step_fits(
                    self._given,
                    stop,
                    seconds=began - float(self._before.get("time") or 0.0),
                    step=step,
                    tokens=tokens,
                    durations=self.durations,
                    reserve=self.reserve,
                )
            self.stop_reason = stop
            annealed = self._stage.annealed(self.progress, self._warmup)
            return StepPermit(False, self.progress, self._stage.level, annealed, stop)
        progress = min(1.0, max(self.progress, counted, timed))
        level = self._stage.level_at(progress, self._warmup)
        annealed = self._stage.annealed(progress, self._warmup, level)
        permit = StepPermit(True, progress, level, annealed, place=self._stage.place(progress))
        self._running = Running(permit, epochs, began, self._spent)
        return permit

    def _timed(self, step: float, room: float, following: float, end: float) -> float:
        """Progress by the clock after a step of `step` seconds that leaves `room` seconds until `end`.

        following: seconds of the step after it.
        """
        left = self._ahead.training_left(room, following, steps_done=self.steps, end=end)
        if left is None:
            return 1.0
        return self.progress + (1.0 - self.progress) * step / (step + left) if step else self.progress

    def apply(self, permit: StepPermit, epochs: float = 0.0) -> StepPermit:
        """Take over the decision of another process for the step about to run; returns it."""
        if permit.go:
            self._running = Running(permit, epochs, self.seconds, self._spent)
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
        self.durations.set_pace(self.step_time.pace)
        self._finished = (ended, self._spent)
        self._running = None
        self._counted.add(tokens, running.epochs if epochs is None else epochs)
        self.progress = running.permit.progress
        self._stage.finish_step(self.progress, running.permit.warmup, self._warmup)

    def _learn_overhead(self, now: float) -> None:
        if self._finished is not None:
            ended, spent = self._finished
            self.step_time.overhead.add(max(0.0, now - ended - (self._spent - spent)))
            self._finished = None

    # Stages, changes, legs

    @property
    def stage_end(self) -> float:
        """Progress at which the present stage ends."""
        return self._stage.end

    def begin_stage(self, end: float) -> None:
        """Warm-up and profile run once over [present progress, end]; the step that reaches `end` lands.

        Progress itself does not change. At first the stage is [0, 1].
        """
        self._stage = Stage(start=self.progress, end=end)

    def change(self, limits: Limits) -> str:
        """New limits, or a new price, from now on; returns one line that says what changed.

        Progress goes on from where it stands and reaches 1 at the new end. As those of the constructor, the
        limits are of the present leg. Raises UserError when one cannot be measured here (the old ones stay),
        and BudgetError when one is already used up (the new ones hold: the next permit is a stop).
        """
        limits.check(energy_measured=self.joules is not None)
        line = self._given.changes(limits)
        if limits != self._given:
            self._take(limits, anew=not limits.same_but_price(self._given))
            refusal = already_spent(self.limits, self._amounts(), resumed=False)
            if refusal is not None:
                raise refusal
            line += f"; progress goes on from {self.progress:.0%}"
        return line

    def extend(self, limits: Limits) -> None:
        """A finished run goes on: `limits` count from now, and progress, warm-up and profile start again.

        Raises UserError when one of them cannot be measured on this machine.
        """
        limits.check(energy_measured=self.joules is not None)
        self._account.set_price(limits.price_per_hour)
        self._before = self._amounts()
        self.leg += 1
        self.progress = 0.0
        self.stop_reason = None
        self._leg_began_at = self.steps
        self._stage = Stage()
        self._running = None
        self._ahead.landed.clear()
        for cadence in self._ahead.cadences:
            cadence.restart(self.leg)
        self._take(limits, anew=True)

    def _take(self, limits: Limits, *, anew: bool) -> None:
        """These limits hold from now on. anew: progress by the counted ones takes its slope from here."""
        self._account.set_price(limits.price_per_hour)
        self._given, self.limits = limits, limits.beyond(self._before)
        if anew:
            self._counted.anchor_at(self.progress)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Amounts, as plain values for JSON; no moment of any clock is in it."""
        return {
            **self._account.state_dict(),
            **self._counted.state_dict(),
            "progress": self.progress,
            "leg": self.leg,
            "leg_began_at": self._leg_began_at,
            "before": dict(self._before),
            "limits": asdict(self._given),
            "stage": self._stage.state_dict(),
            "step_time": self.step_time.state_dict(),
            "durations": self.durations.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, lost_seconds: float = 0.0) -> str | None:
        """Go on from what an earlier process of the run had used.

        lost_seconds: spent by that process after it wrote the state and before it ended, where known. The
        time between the processes is nobody's. Where the limits differ from those of the state it is a
        `change`, and its line is returned. Raises BudgetError when the run has already used more than it is
        now given, and UserError when energy is limited but an earlier process could not measure it.
        """
        given = self._given
        self._account.load_state_dict(state, lost_seconds)
        self._counted.load_state_dict(state)
        self.progress = float(state["progress"])
        self.leg = int(state.get("leg", 0))
        self._leg_began_at = int(state.get("leg_began_at", 0))
        self._before = dict(state.get("before", {}))
        self._stage = Stage.from_state(state)
        saved = Limits(**state["limits"]) if "limits" in state else given
        self._take(given, anew=not given.same_but_price(saved))
        refusal = energy_unknown(given, self.joules)
        if given != saved:
            refusal = refusal or already_spent(self.limits, self._amounts(), resumed=True)
        if refusal is not None:
            raise refusal
        self.step_time.load_state_dict(state["step_time"])
        self.durations.load_state_dict(state["durations"], self.step_time.pace)
        return saved.changes(given) if given != saved else None
