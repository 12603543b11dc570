"""The loop, from top to bottom.

Nothing here knows what an adapter, a quantised weight, a packed batch or a pair of answers is: the parts of
`Run` do. One step is: ask the clock, set the rate, accumulate, clip, step, record; then whatever is due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..checkpoint import random_state, set_random_state
from ..data import Step, training_batches
from ..optimizers import set_rate
from ..recipes.errors import BudgetError, DivergedError, UserError
from ..schedules import Limits, StepPermit
from .diverged import find_culprit
from .engine import Interrupted
from .measuring import evaluate_and_record
from .parts import Run, agree
from .saving import keep_state_before_decay, save_checkpoint


def train_loop(run: Run) -> str:
    """Step until the budget, a signal, early stopping, a pause or the end of the stage; returns which.

    Raises DivergedError (after saving the last good state) at the first non-finite loss or gradient.
    """
    state, stage = run.state, run.stage
    settings = run.recipe.optimizer
    batches = training_batches(
        stage.data.train,
        stage.order,
        start=state.step - state.stage_began,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
        num_workers=run.recipe.data.num_workers,
        collate=stage.objective.collate,
    )
    run.engine.loss_module.objective = stage.objective
    run.engine.loss_module.train()
    for step, micro_batches in batches:
        interval = run.interval()
        if interval is not None:
            return interval
        permit = run.clock.apply(agree(run, partial(_permit, run, step)), step.epoch)
        if not permit.go:
            return str(permit.stop_reason)
        keep_state_before_decay(run, permit)
        boundary = random_state()
        rate = run.peak_rate * run.schedule.factor(permit)
        set_rate(run.engine.optimizer, rate)
        for follow in run.followers:
            follow(permit)
        began = time.monotonic()
        run.snapshots.before_backward()
        count = stage.count(step)
        try:
            loss_sum = run.engine.forward_backward(micro_batches, count, _interrupt(run))
        except Interrupted:
            set_random_state(boundary)
            run.clock.stop(run.stop.name)
            return run.stop.name
        run.snapshots.settle()
        grad_norm = float(run.engine.step(settings.max_grad_norm))
        loss = float(loss_sum) / count
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            set_random_state(boundary)
            _diverged(run, micro_batches, loss, grad_norm)
        if state.step == 0 and grad_norm == 0.0:
            raise UserError("step 1: no trained weight has a gradient, so nothing would be learned")
        seconds = time.monotonic() - began
        run.clock.finish_step(seconds=seconds, tokens=step.tokens, epochs=step.epoch)
        state.step += 1
        state.step_seconds += seconds
        state.tokens += step.tokens
        state.trained_tokens += step.trained_tokens
        state.epoch = step.epoch
        state.train_loss = loss
        state.learning_rate = rate
        _record(run, loss, rate, grad_norm, step.tokens / seconds)
        evaluate_now, save_now, snapshot_now = agree(run, partial(_what_is_due, run))
        if evaluate_now:
            improved = evaluate_and_record(run, rows=run.plan.eval_rows_between)
            save_now |= improved and run.recipe.checkpoint.keep_best
            patience = run.recipe.eval.early_stopping_patience
            if patience is not None and state.evals_without_gain >= patience:
                run.clock.stop("early_stopping")
                return "early_stopping"
        if save_now:
            save_checkpoint(run)
        if snapshot_now:
            run.snapshots.take(run)
    raise AssertionError("the order of training rows has no end")


def _permit(run: Run, step: Step) -> StepPermit:
    """The clock's decision, under the limits that stand at this moment."""
    changed = run.budget_file.poll()
    warning = run.budget_file.take_warning()
    if changed is not None:
        try:
            line = run.clock.change(Limits.from_recipe(changed))
        except BudgetError as error:  # spent already: nothing is left but to land
            line = str(error)
        except UserError as error:  # cannot be measured here: the old limits stand
            line, warning = "", str(error)
        if line:
            run.tracking.event("budget", text=line)
            run.screen.note(line)
    if warning:
        run.tracking.event("warning", text=warning)
        run.screen.warn(warning)
    permit = run.clock.plan_step(step.tokens, step.epoch)
    return permit.stopped(run.stop.name) if run.stop() else permit


def _interrupt(run: Run) -> Callable[[], bool]:
    """Within a step only a single process may stop at once: others would wait for it for ever."""
    return run.stop if run.accelerator.num_processes == 1 else lambda: False


def _what_is_due(run: Run) -> tuple[bool, bool, bool]:
    return (
        run.plan.eval_rows_between > 0 and run.clock.should_run(run.eval_due),
        run.clock.should_run(run.save_due),
        run.snapshots.due(run.clock),
    )


def _record(run: Run, loss: float, rate: float, grad_norm: float, tokens_per_second: float) -> None:
    if not run.is_main:
        return
    state = run.state
    record: dict[str, Any] = {
        "step": state.step,
        "seconds": run.clock.seconds,
        "tokens": state.tokens,
        "progress": run.clock.progress,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "tokens_per_second": tokens_per_second,
        "epoch": state.epoch,
        "cost": run.clock.cost,
        "joules": run.clock.joules,
        **run.memory.now(),
    }
    if len(run.stages) > 1:
        record["stage"] = run.stage.name
    if run.legs:
        record["leg"] = len(run.legs)
    if state.step % run.recipe.track.logging_steps == 0:
        run.tracking.metrics(record)
    run.screen.step(record | {"finish_in": run.clock.finish_in(), "epoch": state.epoch})


def _diverged(run: Run, batches: list[Any], loss: float, grad_norm: float) -> None:
    """Save what is still good (all of it, unless the backward pass has stepped), say where it broke, stop."""
    where = find_culprit(run.engine, batches)
    run.engine.optimizer.zero_grad(set_to_none=True)
    if run.engine.half_stepped() is None:
        kept = f"The state before that step is kept: {save_checkpoint(run) or 'the last checkpoint'}"
    else:
        last = run.state.last_saved
        kept = (
            "optimizer.step_in_backward had stepped other weights by then, so the state before that step is "
            + (f"only kept as of step {last}" if last >= 0 else "lost, and no checkpoint had been saved")
            + ".   With optimizer.clipping=exact nothing changes until all gradients are known"
        )
    if run.is_main:
        run.tracking.event("diverged", step=run.state.step + 1, loss=loss, grad_norm=grad_norm, where=where)
    raise DivergedError(
        f"step {run.state.step + 1}: loss {loss}, gradient norm {grad_norm}\n"
        f"  {where}\n"
        f"  {kept}\n"
        f"  Try a lower rate: optimizer.learning_rate={run.plan.learning_rate / 3:.1e}"
    )
