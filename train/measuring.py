"""Held-out measurements of a run: into its state, its events and its trackers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..recipes.errors import DivergedError, UserError
from .evaluation import EvalResult, evaluate
from .parts import Run, Stage

RISING = frozenset({"accuracy", "margin", "chosen_reward"})
"""Metrics of which more is better; of all others less is."""


def measure(run: Run, stage: Stage, *, rows: int) -> EvalResult:
    """The metrics of a stage's objective on its first `rows` held-out rows.

    After the last step those rows that no evaluation between the steps measures are left out where the time
    does not last for them. Raises DivergedError where the loss is not finite.
    """
    run.snapshots.settle()  # some optimizers are measured at other weights than they train
    plan, module = stage.plan, run.engine.loss_module
    before, module.objective = module.objective, stage.objective
    kind = eval_kind(run.stages, stage)
    try:
        # A landing measures more rows than the evaluations between, and is predicted from them.
        with run.clock.spent(kind, rows) as piece:
            result = evaluate(
                run.engine,
                run.accelerator,
                stage.data.eval.part(0, rows),
                compared=plan.eval_rows_between,
                micro_tokens=plan.micro_tokens,
                micro_rows=plan.micro_rows,
                packed=plan.packed,
                rest_fits=partial(run.clock.rest_fits, kind),
            )
            piece.size = result.rows
    finally:
        module.objective = before
    if not math.isfinite(result.loss):
        step = run.state.step
        advice = (
            "Earlier checkpoints stand.  Try a lower rate: optimizer.learning_rate="
            f"{run.plan.learning_rate / 3:.1e}"
            if step
            else "The model gives it before any training.  Try model.dtype=float32, or look at the rows: "
            "shoestring check RECIPE"
        )
        raise DivergedError(f"step {step}: the held-out loss is {result.loss}\n  {advice}")
    return result


def eval_kind(stages: Sequence[Stage], stage: Stage) -> str:
    """What the clock calls an evaluation of this stage."""
    return "eval" if stage is stages[0] else f"eval {stage.name}"


def evaluate_and_record(run: Run, *, rows: int) -> bool:
    """Measure the present stage into state, events and trackers; True when it is the best so far."""
    state = run.state
    result = measure(run, run.stage, rows=rows)
    wanted = run.recipe.eval.metric_for_best_model
    if wanted not in result.metrics:
        raise UserError(
            f"eval.metric_for_best_model is {wanted!r}, which the objective does not measure; allowed: "
            f"{', '.join(result.metrics)}"
        )
    score = result.comparable_loss if wanted == "loss" else result.metrics[wanted]
    if wanted in RISING:
        score = -score
    improved = state.best_score is None or score < state.best_score
    if improved:
        state.best_score, state.best_eval_loss, state.best_step = score, result.loss, state.step
    state.evals_without_gain = 0 if improved else state.evals_without_gain + 1
    if state.stage == 0:
        keep_loss(run, result)
    record(run, run.stage, result, "best" if improved else "")
    return improved


def keep_loss(run: Run, result: EvalResult) -> None:
    """The run's loss, on the first stage's rows; beside it the untrained one on the same rows."""
    state = run.state
    state.eval_loss = result.loss
    if state.step == 0:
        state.eval_loss_before, state.eval_loss_before_compared = result.loss, result.comparable_loss
    elif not result.whole:
        state.eval_loss_before = state.eval_loss_before_compared


def record(run: Run, stage: Stage, result: EvalResult, remark: str = "") -> None:
    """One event, and a line on the screen; of a run with several stages it names the stage."""
    about: dict[str, Any] = {"stage": stage.name} if len(run.stages) > 1 else {}
    run.tracking.event(
        "eval",
        step=run.state.step,
        kind="eval",
        duration=result.seconds,
        rows=result.rows,
        **about,
        **result.metrics,
    )
    others = "".join(
        f", {name} {value:.3g}"
        for name, value in result.metrics.items()
        if name not in ("loss", "perplexity")
    )
    kind = f"{stage.name} loss" if about else "loss"
    note = f" ({remark})" if remark else ""
    if not result.whole:
        note += f", on {result.rows} rows: no time was left for the others"
    run.screen.note(f"step {run.state.step}: held-out {kind} {result.loss:.4f}{others}{note}")
