"""The course of a sweep: rung by rung all trials to the pause and the worse ones out; the best one lands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..recipes import load_recipe
from ..recipes.errors import DivergedError
from .figures import share_text
from .rundir import write_text
from .sweep_costs import NOTHING, measured_costs
from .sweep_grid import Job
from .sweep_leg import Stopped, Sweep, count_what_was_lost, run_leg
from .sweep_page import write_page
from .sweep_plan import grant, whole_trial
from .sweep_ranking import best_first, furthest_first
from .sweep_results import drop_checkpoints, has_checkpoint
from .sweep_state import Trial


def conduct(sweep: Sweep) -> int:
    """From wherever the state stands to the winner; returns the exit code. Raises DivergedError."""
    try:
        count_what_was_lost(sweep)
        sweep.save()
        if not sweep.state.finalists:
            run_ladder(sweep)
        run_to_end(sweep)
    except Stopped:
        sweep.save()
        sweep.say(f"{sweep.stop.name}: saved in {sweep.job.output}; the same command goes on from there")
        return sweep.stop.exit_code
    return 0


def run_ladder(sweep: Sweep) -> None:
    """Until one trial is to go on alone. Writes the order in which they may win into the state."""
    state = sweep.state
    while state.rung < len(sweep.ladder.pauses) and len(state.alive()) > 1:
        given = _grant(sweep)
        if given is None:
            state.notes.append("the budget was used up before the next comparison: the best so far lands")
            break
        _, until = sweep.ladder.ends(state.rung)
        for trial in state.alive():
            if not trial.finished and all(leg.rung < state.rung for leg in trial.legs):
                run_leg(sweep, trial, until, given)
        decide(sweep, until)
    waiting = [t for t in state.trials if t.state == "out" and has_checkpoint(sweep.job.folder(t.name))]
    state.finalists = [trial.name for trial in (*furthest_first(state.alive()), *furthest_first(waiting))]
    sweep.save()


def decide(sweep: Sweep, until: float) -> None:
    """Who goes on from the pause at `until`.

    Where only one does, the others keep their checkpoints until it has landed: the next one takes its place
    if it fails.
    """
    state = sweep.state
    order = best_first(state.alive(), sweep.job, by=sweep.by)
    keep = min(len(order), sweep.ladder.counts[state.rung + 1])
    for trial in order[keep:]:
        trial.state, trial.reason = "out", f"stopped at {share_text(until)}"
        if keep > 1:
            drop_checkpoints(sweep.job.folder(trial.name))
    state.rung += 1
    if order:
        note = f"at {share_text(until)} of a trial's budget {keep} of {len(order)} go on"
        state.notes.append(note)
        sweep.say(f"{note}: {', '.join(trial.name for trial in order[:keep])}")
    sweep.save()
    write_page(sweep.job, sweep.ladder, state)


def run_to_end(sweep: Sweep) -> None:
    """The best trial takes what is left; if it fails, the next one does. Raises DivergedError at none."""
    job, state = sweep.job, sweep.state
    for trial in (state.trial(name) for name in state.finalists):
        if trial.state == "failed":
            continue
        trial.state, trial.reason = "alive", ""
        if not trial.finished:
            run_leg(sweep, trial, 1.0, None)
        if trial.finished:
            break
    else:
        write_page(job, sweep.ladder, state)
        raise _none_left(job, state.trials)
    trial.state, state.winner = "won", trial.name
    for other in state.trials:
        if other is not trial:
            other.state = "out" if other.state == "alive" else other.state
            drop_checkpoints(job.folder(other.name))
    leave_the_best(job, trial)
    sweep.save()
    write_page(job, sweep.ladder, state)


def leave_the_best(job: Job, trial: Trial) -> None:
    """best.yaml, the winner's recipe with its own budget; and `final`, a link to what it exported."""
    last = trial.legs[-1]
    used = {"time": last.clock, "tokens": last.tokens, "steps": last.step}[job.unit]
    overrides = job.trial_overrides(trial.values, trial.name, used)
    resolved = load_recipe(job.source, [*overrides, f"output_dir={job.quoted(f'{job.output}-best')}"])
    write_text(job.output / "best.yaml", resolved.to_yaml())
    final = job.folder(trial.name) / "final"
    if final.is_dir():
        link, aside = job.output / "final", job.output / f".final.tmp{os.getpid()}"
        aside.unlink(missing_ok=True)
        aside.symlink_to(Path("sweep") / trial.name / "final")
        os.replace(aside, link)


def _grant(sweep: Sweep) -> float | None:
    """What each trial of the present rung may use, the same for all; None when nothing is left to train."""
    state = sweep.state
    if len(state.grants) == state.rung:
        legs = sweep.ladder.legs(state.rung, len(state.alive()))
        done = [leg for trial in state.trials for leg in trial.legs]
        costs = measured_costs(state.guess, done) if sweep.job.unit == "time" else NOTHING
        left = sweep.left()
        if whole_trial(left, legs, costs) <= 0:
            return None
        state.grants.append(grant(left, legs, costs, sweep.ladder))
        sweep.save()
    return state.grants[state.rung]


def _none_left(job: Job, trials: Sequence[Trial]) -> DivergedError:
    lines = [f"{job.output}: no trial is left", *(f"  {trial.name}: {trial.reason}" for trial in trials)]
    return DivergedError("\n".join([*lines, f"  What they said last is in {job.folder('*')}/log.txt"]))
