"""Checkpoints of a run: everything that a resume needs, and the one kept for more budget later."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from ..checkpoint import name_of, prune, random_state, save, set_best
from ..schedules import StepPermit
from .parts import Run
from .sharded import whole_state


def save_checkpoint(run: Run) -> Path | None:
    """Everything that a resume needs, written by the main process; the path, or None on the others."""
    state = run.state
    if state.last_saved == state.step:
        return None
    previous, state.last_saved = state.last_saved, state.step
    randoms = gather_object([random_state()])
    path = None
    with (
        run.clock.spent("save"),
        run.tracking.timed("save") as event,
        whole_state(run.engine) as found,
    ):
        if found is not None:
            tensors, settings = found
            reference = run.stage.objective.reference
            if reference is not None:
                tensors["reference"] = reference.state_dict()
            try:
                path = save(
                    run.run_dir.path,
                    step=state.step,
                    tensors=tensors,
                    json={"trainer": trainer_state(run), "random": randoms, **settings},
                    copy=run.run_dir.model_writer(
                        run.engine.loss_module.model,
                        run.tokenizer,
                        run.engine.writable,
                        run.engine.streamed,
                    ),
                    copy_bytes=sum(p.nbytes for p in run.engine.parameters.values()),
                )
            except BaseException:
                state.last_saved = previous
                raise
            if run.recipe.checkpoint.keep_best and state.best_step == state.step:
                set_best(run.run_dir.path, path)
            protected = () if state.before_decay is None else (name_of(state.before_decay),)
            prune(run.run_dir.path, keep=run.recipe.checkpoint.keep, protect=protected)
            event["path"] = path.name
    run.accelerator.wait_for_everyone()
    return path


def keep_state_before_decay(run: Run, permit: StepPermit) -> None:
    """Before the first step whose rate leaves the peak, save the state that more budget would go on from.

    For `checkpoint.keep_pre_decay` with a schedule that has such a point; once in each leg.
    """
    leaves = run.schedule.leaves_peak_at
    if not run.recipe.checkpoint.keep_pre_decay or leaves is None or permit.annealed <= leaves:
        return
    if run.state.before_decay is None:
        run.state.before_decay = run.state.step
        save_checkpoint(run)


def trainer_state(run: Run) -> dict[str, Any]:
    """Counters, clock and cadences: all of the state that is neither tensors nor generators."""
    return {
        "state": asdict(run.state),
        "clock": run.clock.state_dict(),
        "eval_due": run.eval_due.state_dict(),
        "save_due": run.save_due.state_dict(),
        "tracking": run.tracking.state_dict(),
        "identity": run.identity,
    }
