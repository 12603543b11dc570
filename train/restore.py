"""A run that goes on: its clock, its weights, and what begins anew when it was given more budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from ..checkpoint import BrokenCheckpoint, ShardedSnapshot, set_random_state
from ..recipes.errors import BudgetError, UserError
from ..schedules import Clock, Counter, Limits, Schedule, energy_source
from .parts import Run, Saved
from .rundir import RunDir
from .stages import StagePlan
from .tracking import read_jsonl

MAY_CHANGE = frozenset({"recipe.budget", "world_size"})
"""What a run may go on with that it did not begin with."""


def build_clock(
    limits: Limits,
    stages: Sequence[StagePlan],
    schedule: Schedule,
    counters: Sequence[Counter],
    started: float,
    *,
    new_leg: bool,
) -> Clock:
    """The clock of this leg; of a new one it has no limit until `extend` gives it one."""

    def joules() -> float | None:
        return sum(counter.joules() for counter in counters) if counters else None

    first = stages[0].plan
    # At the end every stage is measured; where time is short, on the rows of the evaluations between alone.
    kinds = ["eval", *(f"eval {stage.name}" for stage in stages[1:])]
    evals = {kind: stage.plan for kind, stage in zip(kinds, stages, strict=True)}
    return Clock(
        Limits(seconds=float("inf"), price_per_hour=limits.price_per_hour) if new_leg else limits,
        started=started,
        joules=joules,
        energy_source=energy_source(counters),
        reserve_guess=first.reserve_guess
        | {kind: plan.reserve_guess["eval"] for kind, plan in evals.items()},
        least_sizes={kind: plan.eval_rows_between for kind, plan in evals.items() if plan.eval_rows_between},
        seconds_per_token_guess=first.seconds_per_token,
        warmup=schedule.warmup,
    )


def restore_clock(clock: Clock, saved: dict[str, Any], run_dir: RunDir) -> str | None:
    """Also count what the stopped process spent after its last checkpoint, as far as its log tells.

    Returns one line where the budget is another than before.
    """
    log = [*read_jsonl(run_dir.metrics), *read_jsonl(run_dir.events)]
    told = [float(record["seconds"]) for record in log if isinstance(record.get("seconds"), int | float)]
    lost = max(0.0, max(told, default=0.0) - float(saved["seconds"]))
    try:
        return clock.load_state_dict(saved, lost_seconds=lost)
    except BudgetError:
        return clock.load_state_dict(saved)  # nothing is left to train with, but it can still land


@contextmanager
def as_saved(checkpoint: Saved | None) -> Iterator[None]:
    """Tell what a whole checkpoint lacks, or has in another shape, as a fault of the file and not of ours."""
    try:
        yield
    except (BrokenCheckpoint, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if checkpoint is None:
            raise
        raise UserError(
            f"{checkpoint.name} does not hold what this version saves ({type(error).__name__}: {error}).\n"
            "  It was written by another program.  Start again with --fresh, or set another output_dir."
        ) from error


def load_weights(run: Run, checkpoint: Saved) -> None:
    """Trained weights, the optimizer's state, and the reference model of a stage that has one."""
    tensors = {name: checkpoint.open_tensors(name) for name in ("trained", "optimizer")}
    run.engine.load_state_dict(tensors, {"optimizer": checkpoint.json("optimizer")})
    reference = run.stage.objective.reference
    if reference is not None:
        reference.load_state_dict(checkpoint.tensors("reference"))


def set_generators(checkpoint: Saved, run: Run) -> list[str]:
    """The generators of this process as they were; returns lines on what could not be restored."""
    if isinstance(checkpoint, ShardedSnapshot):
        saved = [state for states in checkpoint.jsons("random") for state in states]
    else:
        saved = checkpoint.json("random")
    before = int(checkpoint.json("trainer")["identity"]["world_size"])
    if not isinstance(saved, list) or len(saved) != before:
        raise ValueError(f"random.json is not of {before} processes")
    index = run.accelerator.process_index
    if index < before:
        return set_random_state(saved[index])
    # A process more than there were: numbers that no other one draws.
    set_seed(run.recipe.train.seed + run.state.step * run.accelerator.num_processes + index)
    return []


def other_processes(trainer: dict[str, Any], accelerator: Accelerator) -> str | None:
    """One line where the run was begun by another number of processes."""
    before = trainer.get("identity", {}).get("world_size", accelerator.num_processes)
    if before == accelerator.num_processes:
        return None
    return (
        f"goes on with {accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}, "
        f"where {before} had begun: steps are of the same rows, and agree up to rounding"
    )


def begin_leg(run: Run) -> None:
    """Counters that a new leg starts anew. Evaluations and saves count from here."""
    state = run.state
    state.before_decay = None
    state.evals_without_gain = 0
    state.last_saved = -1
    for cadence in (run.eval_due, run.save_due):
        cadence.fired(state.step, 0.0, run.clock.seconds)
    leg = run.legs[-1]
    run.tracking.event("extend", rule=leg.rule, text=leg.why, source=leg.source, peak=leg.peak)
