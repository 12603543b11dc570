"""`shoestring sweep`: one budget over several trials.

read_job         the grid, every trial's recipe checked
make_ladder      who runs how far
fitting_figures  what a trial costs, by its plan; refused when the budget cannot hold the rungs
conduct          rung by rung, then the best one on all that is left
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from ..recipes.errors import BudgetError, UserError, in_columns
from ..schedules.now import deadline_now
from .rundir import RunDir
from .signals import stop_on_signals
from .sweep_costs import Figures, Planner, figures_of, fitting_figures, no_room
from .sweep_grid import Job, read_job
from .sweep_leg import Sweep
from .sweep_page import PAGE
from .sweep_plan import make_ladder
from .sweep_process import make_plan, trainer
from .sweep_ranking import EARLY_SIGNALS, RULES
from .sweep_results import clear_trial
from .sweep_rungs import conduct
from .sweep_state import FILE, State, Trial, check_settings, load_state, settings_of
from .sweep_table import print_result, show_plan

_BATCH_KEYS = ("train.batch_tokens", "train.per_device_train_batch_size", "train.gradient_accumulation_steps")


def sweep_recipe(
    source: str,
    overrides: Sequence[str],
    *,
    over: Sequence[str],
    budget: str | None,
    reduction: int,
    rungs: int | None,
    by: str,
    dry_run: bool,
    fresh: bool,
    started: float,
) -> int:
    """Carry out a sweep; returns the exit code: 0 done, 130 or 143 stopped by a signal and saved.

    started: of the user's command, on time.monotonic's axis. Raises UserError; BudgetError when the budget
    cannot hold the rungs; DivergedError when no trial is left.
    """
    job = read_job(source, overrides, over, budget)
    _check_rule(by, job)
    ladder = make_ladder(len(job.candidates), reduction, rungs)
    console = Console(highlight=False)

    def plan() -> Figures:
        figures = fitting_figures(
            job.amount, ladder, planner(job), unit=job.unit, reduction=reduction, automatic=rungs is None
        )
        if not figures.eval_rows:
            text = "holds no rows out, and trials are compared on these.   Set data.eval=0.05"
            raise UserError(in_columns([("data.eval", text)]))
        return figures

    if dry_run:
        show_plan(console, job, ladder, plan())
        return 0
    settings = settings_of(
        [(axis.key, axis.values) for axis in job.axes],
        budget=f"{job.unit}={job.amount:g}",
        reduction=reduction,
        rungs=len(ladder.pauses),
        by=by,
        recipe=job.resolved.recipe.model_dump(mode="json"),
    )
    _refuse_a_run(job.output)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(RunDir(job.output).lock())
        if fresh:
            clear(job.output)
        state = load_state(job.output / FILE)
        if state is None:
            figures = plan()
            state = State(settings, [Trial(c.name, c.values) for c in job.candidates], guess=figures.costs)
            show_plan(console, job, ladder, figures)
        else:
            check_settings(state.settings, settings, output=job.output)
            if state.winner is not None:
                console.print(
                    f"{job.output} holds a finished sweep.  Start over with --fresh, or into another folder "
                    "with output_dir=runs/NAME",
                    markup=False,
                )
                print_result(console, job, ladder, state)
                return 0
        sweep = Sweep(
            job=job,
            ladder=ladder,
            by=by,
            state=state,
            run=trainer(stop),
            stop=stop,
            say=lambda text: console.print(text, markup=False, soft_wrap=True),
            began=started + deadline_now() - time.monotonic(),
            before=state.seconds,
        )
        code = conduct(sweep)
        if code == 0:
            print_result(console, job, ladder, state)
        return code


def read_rungs(text: str) -> int | None:
    """`--rungs` as typed; None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UserError(in_columns([("--rungs", f"{text!r} is not a number; allowed: auto, or 1, 2, ...")]))
    return int(text)


def planner(job: Job) -> Planner:
    """Plans the first trial that fits the memory, in a process of its own: this one stays small."""
    fitting = list(job.candidates)

    def plan(amount: float) -> Figures:
        while True:
            first = fitting[0]
            try:
                values, seconds = make_plan(
                    [job.source, *job.trial_overrides(first.values, first.name, amount)]
                )
            except BudgetError as error:
                if not no_room(error) or len(fitting) == 1:
                    raise
                del fitting[0]  # it will be out as soon as it starts; others may fit
            else:
                return figures_of(values, job.unit, start_up=seconds)

    return plan


def clear(output: Path) -> None:
    """Delete what an earlier sweep wrote (`--fresh`) and nothing else. Call with the lock held."""
    folder = output / "sweep"
    if folder.is_dir():
        for trial in sorted(folder.iterdir()):
            clear_trial(trial)
        if not any(folder.iterdir()):
            folder.rmdir()
    for name in (FILE, PAGE, "best.yaml", "final"):
        (output / name).unlink(missing_ok=True)


def _refuse_a_run(output: Path) -> None:
    """A folder with a run of its own is no place for a sweep: both would claim `final`."""
    final = output / "final"
    if (output / "resolved.yaml").exists() or (final.exists() and not final.is_symlink()):
        text = f"{output} holds a run.   Choose another folder for the sweep: output_dir={output}-sweep"
        raise UserError(in_columns([("output_dir", text)]))


def _check_rule(by: str, job: Job) -> None:
    if by not in RULES:
        raise UserError(in_columns([("--by", f"{by!r} is not known; allowed: {', '.join(RULES)}")]))
    batches = [axis.key for axis in job.axes if axis.key in _BATCH_KEYS]
    if by == EARLY_SIGNALS and batches:
        text = (
            f"{by} compares gradient norms, which depend on the batch, and {batches[0]} is swept over.   "
            "Use --by held_out_loss"
        )
        raise UserError(in_columns([("--by", text)]))
