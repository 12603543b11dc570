"""The loop, from top to bottom.

Nothing here knows what an adapter, a quantised weight or a packed batch is: the parts of `Run` do. One step
is: ask the clock, set the rate, accumulate, clip, step, record; then whatever is due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase

from ..checkpoint import prune, random_state, save, set_best, set_random_state
from ..data import Order, Prepared, Step, training_batches
from ..optimizers import set_rate
from ..plan import Plan
from ..recipes import Recipe
from ..recipes.errors import DivergedError, UserError
from ..schedules import Cadence, Clock, Schedule, StepPermit
from .diverged import find_culprit
from .engine import Interrupted, NativeEngine
from .evaluation import evaluate
from .meters import Memory
from .rundir import RunDir
from .screen import Screen
from .signals import StopRequest
from .tracking import Tracking


@dataclass
class State:
    """What has happened so far; all of it goes into every checkpoint."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    epoch: float = 0.0
    train_loss: float | None = None
    learning_rate: float | None = None
    step_seconds: float = 0.0
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_score: float | None = None
    best_step: int = -1
    evals_without_gain: int = 0
    last_saved: int = -1
    samples_before: list[str] = field(default_factory=list)


@dataclass
class Run:
    """All parts of one run, built by `run.py`."""

    recipe: Recipe
    plan: Plan
    accelerator: Accelerator
    engine: NativeEngine
    tokenizer: PreTrainedTokenizerBase
    schedule: Schedule
    clock: Clock
    order: Order
    data: Prepared
    run_dir: RunDir
    tracking: Tracking
    screen: Screen
    memory: Memory
    stop: StopRequest
    identity: dict[str, Any]
    eval_due: Cadence
    save_due: Cadence
    state: State = field(default_factory=State)
    resumed_from: str | None = None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and decides."""
        return bool(self.accelerator.is_main_process)


def train_loop(run: Run) -> str:
    """Step until the budget, a signal or early stopping ends it; returns the reason.

    Raises DivergedError (after saving the last good state) at the first non-finite loss or gradient.
    """
    state = run.state
    settings = run.recipe.optimizer
    batches = training_batches(
        run.data.train,
        run.order,
        start=state.step,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
        num_workers=run.recipe.data.num_workers,
        collate=run.engine.loss_module.objective.collate,
    )
    run.engine.loss_module.train()
    for step, micro_batches in batches:
        permit = run.clock.apply(agree(run, partial(_permit, run, step)), step.epoch)
        if not permit.go:
            return str(permit.stop_reason)
        boundary = random_state()
        rate = run.plan.learning_rate * run.schedule.factor(permit)
        set_rate(run.engine.optimizer, rate)
        began = time.monotonic()
        try:
            loss_sum = run.engine.forward_backward(micro_batches, step.trained_tokens, _interrupt(run))
        except Interrupted:
            set_random_state(boundary)
            run.clock.stop(run.stop.name)
            return run.stop.name
        grad_norm = float(run.engine.step(settings.max_grad_norm))
        loss = float(loss_sum) / step.trained_tokens
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            set_random_state(boundary)
            _diverged(run, step, micro_batches, loss, grad_norm)
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
        evaluate_now, save_now = agree(run, partial(_what_is_due, run))
        if evaluate_now:
            improved = evaluate_and_record(run, rows=run.plan.eval_rows_between)
            save_now |= improved and run.recipe.checkpoint.keep_best
            patience = run.recipe.eval.early_stopping_patience
            if patience is not None and state.evals_without_gain >= patience:
                run.clock.stop("early_stopping")
                return "early_stopping"
        if save_now:
            save_checkpoint(run)
    raise AssertionError("the order of training rows has no end")


def agree(run: Run, decide: Callable[[], Any]) -> Any:
    """The main process decides, the others follow: clocks of two processes are never equal."""
    if run.accelerator.num_processes == 1:
        return decide()
    holder = [decide() if run.is_main else None]
    broadcast_object_list(holder)
    return holder[0]


def _permit(run: Run, step: Step) -> StepPermit:
    permit = run.clock.plan_step(step.tokens, step.epoch)
    return permit.stopped(run.stop.name) if run.stop() else permit


def _interrupt(run: Run) -> Callable[[], bool]:
    """Within a step only a single process may stop at once: others would wait for it for ever."""
    return run.stop if run.accelerator.num_processes == 1 else lambda: False


def _what_is_due(run: Run) -> tuple[bool, bool]:
    return (
        run.plan.eval_rows_between > 0 and run.clock.should_run(run.eval_due),
        run.clock.should_run(run.save_due),
    )


def _record(run: Run, loss: float, rate: float, grad_norm: float, tokens_per_second: float) -> None:
    if not run.is_main:
        return
    state = run.state
    record = {
        "step": state.step,
        "seconds": run.clock.seconds,
        "tokens": state.tokens,
        "progress": run.clock.progress,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "tokens_per_second": tokens_per_second,
        **run.memory.now(),
    }
    if state.step % run.recipe.track.logging_steps == 0:
        run.tracking.metrics(record)
    run.screen.step(record | {"finish_in": run.clock.finish_in(), "epoch": state.epoch})


def evaluate_and_record(run: Run, *, rows: int) -> bool:
    """Loss on the first `rows` held-out rows into state, events and trackers; True when the best so far."""
    state, plan = run.state, run.plan
    with run.clock.spent("eval"):
        result = evaluate(
            run.engine,
            run.accelerator,
            run.data.eval.part(0, rows),
            compared=plan.eval_rows_between,
            micro_tokens=plan.micro_tokens,
            micro_rows=plan.micro_rows,
            packed=plan.packed,
        )
    if not math.isfinite(result.loss):
        advice = (
            "Earlier checkpoints stand.  Try a lower rate: optimizer.learning_rate="
            f"{run.plan.learning_rate / 3:.1e}"
            if state.step
            else "The model gives it before any training.  Try model.dtype=float32, or look at the rows: "
            "shoestring check RECIPE"
        )
        raise DivergedError(f"step {state.step}: the held-out loss is {result.loss}\n  {advice}")
    wanted = run.recipe.eval.metric_for_best_model
    if wanted not in result.metrics:
        raise UserError(
            f"eval.metric_for_best_model is {wanted!r}, which the objective does not measure; allowed: "
            f"{', '.join(result.metrics)}"
        )
    score = result.comparable_loss if wanted == "loss" else result.metrics[wanted]
    improved = state.best_score is None or score < state.best_score
    if improved:
        state.best_score, state.best_eval_loss, state.best_step = score, result.loss, state.step
    state.evals_without_gain = 0 if improved else state.evals_without_gain + 1
    state.eval_loss = result.loss
    run.tracking.event("eval", step=state.step, kind="eval", duration=result.seconds, **result.metrics)
    run.screen.note(f"step {state.step}: held-out loss {result.loss:.4f}" + (" (best)" if improved else ""))
    return improved


def save_checkpoint(run: Run) -> Path | None:
    """Everything that a resume needs, written by the main process; the path, or None on the others."""
    state = run.state
    if state.last_saved == state.step:
        return None
    previous, state.last_saved = state.last_saved, state.step
    randoms = gather_object([random_state()])
    path = None
    if run.is_main:
        with run.clock.spent("save"), run.tracking.timed("save") as event:
            tensors, settings = run.engine.state_dict()
            trainer = {
                "state": asdict(state),
                "clock": run.clock.state_dict(),
                "eval_due": run.eval_due.state_dict(),
                "save_due": run.save_due.state_dict(),
                "tracking": run.tracking.state_dict(),
                "identity": run.identity,
            }
            try:
                path = save(
                    run.run_dir.path,
                    step=state.step,
                    tensors=tensors,
                    json={"trainer": trainer, "random": randoms, **settings},
                    copy=run.run_dir.model_writer(
                        run.engine.loss_module.model, run.tokenizer, run.engine.writable
                    ),
                    copy_bytes=sum(p.nbytes for p in run.engine.parameters.values()),
                )
            except BaseException:
                state.last_saved = previous
                raise
            if run.recipe.checkpoint.keep_best and state.best_step == state.step:
                set_best(run.run_dir.path, path)
            prune(run.run_dir.path, keep=run.recipe.checkpoint.keep)
            event["path"] = path.name
    run.accelerator.wait_for_everyone()
    return path


def _diverged(run: Run, step: Step, batches: list[Any], loss: float, grad_norm: float) -> None:
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
