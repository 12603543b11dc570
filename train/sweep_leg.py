"""One leg of one trial: started or taken up again, and entered into the sweep's state however it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from ..schedules.now import deadline_now
from .figures import share_text
from .signals import StopRequest
from .sweep_costs import amount_text
from .sweep_grid import Job
from .sweep_plan import Ladder
from .sweep_process import Outcome, Runner, Task, last_lines, wait_until_free
from .sweep_results import (
    Result,
    done_so_far,
    drop_checkpoints,
    read_result,
    run_clock,
    start_and_end,
    why_failed,
)
from .sweep_state import FILE, LegDone, Running, State, Trial

CLOSING = 1.0
"""Seconds kept for the sweep's own last files and the end of its process."""
_SIGNALS = (130, 143)
_ROUNDING = 1e-6


class Stopped(Exception):
    """A signal came; the running trial has saved."""


@dataclass
class Sweep:
    """A sweep at work. began: on the axis of `now`, of this process; before: seconds used by earlier ones."""

    job: Job
    ladder: Ladder
    by: str
    state: State
    run: Runner
    stop: StopRequest
    say: Callable[[str], None]
    began: float
    now: Callable[[], float] = deadline_now
    before: float = 0.0

    def seconds(self) -> float:
        """Used by the sweep, in all its processes."""
        return self.before + self.now() - self.began

    def left(self) -> float:
        """Of the budget, in its unit; of the time, less what the end of a process and of the sweep takes."""
        if self.job.unit != "time":
            return self.job.amount - sum(trial.spent for trial in self.state.trials)
        legs = [leg for trial in self.state.trials for leg in trial.legs]
        outside = [leg.outside for leg in legs if leg.outside is not None]
        return self.job.amount - self.seconds() - CLOSING - (fmean(outside) if outside else 0.0)

    def save(self) -> None:
        """The state as of now."""
        self.state.seconds = self.seconds()
        self.state.save(self.job.output / FILE)


def run_leg(sweep: Sweep, trial: Trial, until: float, given: float | None) -> None:
    """One trial to its next pause at `until`, or to its end with all that is left (`given` is None).

    given: what it may use beyond what it has. Raises Stopped when a signal came. A trial that fails is marked
    so, and nothing is raised.
    """
    folder = sweep.job.folder(trial.name)
    wait_until_free(folder, sweep.say, sweep.stop)
    if sweep.stop():
        raise Stopped
    running = _begin(sweep, trial, given)
    outcome = None
    result = read_result(folder, until)
    if result is None:
        arguments = [sweep.job.source, *sweep.job.trial_overrides(trial.values, trial.name, running.amount)]
        if until < 1.0:
            arguments += ["--pause-at", repr(until)]
        outcome = sweep.run(Task(trial.name, folder, arguments))
        running.seconds += outcome.seconds
        result = read_result(folder, until)
        if result is None and (sweep.stop() or outcome.code in _SIGNALS):
            if not sweep.stop():  # a signal to the trial alone is one to the sweep
                sweep.stop.signal_number = outcome.code - 128
            raise Stopped
    if result is None:
        assert outcome is not None
        _fail(sweep, trial, running, until, outcome.code)
    else:
        _succeed(sweep, trial, running, until, result, outcome)
    if sweep.stop():
        raise Stopped


def count_what_was_lost(sweep: Sweep) -> None:
    """What a killed sweep spent after its last entry, as far as the log of the trial on its way tells."""
    running = sweep.state.running
    if running is None:
        return
    folder = sweep.job.folder(running.name)
    wait_until_free(folder, sweep.say, sweep.stop)
    lost = max(0.0, run_clock(folder) - running.clock - running.seconds)
    running.seconds += lost
    sweep.before += lost


def _begin(sweep: Sweep, trial: Trial, given: float | None) -> Running:
    """The leg's entry in the state; that of an interrupted one goes on."""
    state, unit = sweep.state, sweep.job.unit
    clock = run_clock(sweep.job.folder(trial.name))
    running = state.running
    if running is None or running.name != trial.name:
        last = trial.last
        step, tokens = (0, 0) if last is None else (last.step, last.tokens)
        running = Running(trial.name, state.rung, 0.0, step, tokens, clock)
    used = {"time": running.clock, "tokens": float(running.tokens), "steps": float(running.step)}[unit]
    if given is None:
        used, given = (clock if unit == "time" else used), max(0.0, sweep.left())
    running.amount = used + given if unit == "time" else float(int(used + given + _ROUNDING))
    state.running = running
    sweep.save()
    return running


def _succeed(
    sweep: Sweep, trial: Trial, running: Running, until: float, result: Result, outcome: Outcome | None
) -> None:
    trial.finished = result.finished
    done = _done(sweep, running, until, result)
    if outcome is not None and running.seconds == outcome.seconds:
        seen = start_and_end(
            sweep.job.folder(trial.name),
            step=running.step,
            tokens=running.tokens,
            clock=running.clock,
            seconds=running.seconds,
        )
        if seen is not None:
            done.start, done.end = seen
            done.outside = max(0.0, running.seconds - (result.seconds - running.clock))
    _enter(sweep, trial, done)
    loss = "not measured" if result.loss is None else f"{result.loss:.4f}"
    early = ", and has finished" if result.finished and until < 1.0 else ""
    spent = amount_text(done.spent, sweep.job.unit)
    sweep.say(f"{trial.name}  to {share_text(until)}  held-out loss {loss}  in {spent}{early}")


def _fail(sweep: Sweep, trial: Trial, running: Running, until: float, code: int) -> None:
    folder = sweep.job.folder(trial.name)
    step, tokens = done_so_far(folder)
    reached = Result(
        0.0, None, max(step, running.step), max(tokens, running.tokens), run_clock(folder), False
    )
    trial.state, trial.reason = "failed", why_failed(folder, code)
    _enter(sweep, trial, _done(sweep, running, until, reached))
    sweep.say(f"{trial.name}  to {share_text(until)}  is out: {trial.reason}")
    for line in last_lines(folder):
        sweep.say(f"    {line}")
    drop_checkpoints(folder)


def _done(sweep: Sweep, running: Running, until: float, result: Result) -> LegDone:
    spent = {
        "time": running.seconds,
        "tokens": float(result.tokens - running.tokens),
        "steps": float(result.step - running.step),
    }[sweep.job.unit]
    return LegDone(
        rung=running.rung,
        until=until,
        progress=result.progress,
        loss=result.loss,
        spent=spent,
        seconds=running.seconds,
        step=result.step,
        tokens=result.tokens,
        clock=result.seconds,
    )


def _enter(sweep: Sweep, trial: Trial, done: LegDone) -> None:
    trial.legs.append(done)
    sweep.state.running = None
    sweep.save()
