"""From a recipe to a finished run: the parts in the order in which they are built."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from accelerate import Accelerator

from ..ops import bound_kernel_cache, keep_freed_memory
from ..ops.memory import map_large_blocks
from ..ops.providers import check_asked
from ..recipes import Resolved, load_recipe
from .building import build
from .engines import check_engine
from .landing import begin_stage, finish, first_measurements, live_report, pause
from .legs import read_legs
from .loop import train_loop
from .offloading import release_state
from .parts import PAUSED, STAGE_OVER, Run
from .quiet import choose_deepspeed_device
from .rehearsal import memory_explained, rehearse
from .rundir import RunDir
from .saving import save_checkpoint
from .screen import Screen, quiet_libraries
from .sharded import begin_sharding, end_sharding
from .signals import StopRequest, stop_on_signals
from .snapshots import Snapshots, open_snapshots


def train_recipe(
    source: str, overrides: Sequence[str], *, fresh: bool, started: float, pause_at: float | None = None
) -> int:
    """Carry out a recipe; returns the exit code: 0 landed or paused, 130 or 143 saved after a signal.

    started: of the user's command, on time.monotonic's axis. pause_at: progress at which the run is measured,
    saved and left. Raises ShoestringError of the fitting kind.
    """
    resolved = load_recipe(source, overrides)
    check_asked()  # not only when the model is built, after the plan's measurement
    quiet_libraries()
    keep_freed_memory()
    if "disk" in (resolved.recipe.offload.optimizer, resolved.recipe.offload.weights):
        map_large_blocks()  # before the measurement of the plan
    bound_kernel_cache()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    choose_deepspeed_device(accelerator.device.type)
    check_engine(resolved.recipe, accelerator)
    screen = Screen(active=accelerator.is_main_process)
    for note in resolved.notes:
        screen.warn(note)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.callback(screen.close)
        run_dir = RunDir(resolved.recipe.output_dir)
        if accelerator.is_main_process:
            stack.enter_context(run_dir.lock())
            run_dir.remove_leftovers()
        snapshots = stack.enter_context(open_snapshots(resolved.recipe, run_dir, accelerator, screen.warn))
        if fresh:
            snapshots.forget()  # first, lest the keeper writes what it holds into the empty directory
            if accelerator.is_main_process:
                run_dir.clear()
        accelerator.wait_for_everyone()
        if run_dir.finished_legs() > len(read_legs(run_dir.legs)):
            screen.note(
                f"{run_dir.path} holds a finished run: {run_dir.report}\n"
                f"Give it more with: shoestring extend {run_dir.path} --budget 1h\n"
                "Run it again from the start with --fresh, or into another folder with output_dir=runs/NAME"
            )
            return 0
        return _train(resolved, accelerator, run_dir, screen, stop, snapshots, started, pause_at)


def _train(
    resolved: Resolved,
    accelerator: Accelerator,
    run_dir: RunDir,
    screen: Screen,
    stop: StopRequest,
    snapshots: Snapshots,
    started: float,
    pause_at: float | None,
) -> int:
    run = build(resolved, accelerator, run_dir, screen, stop, snapshots, started)
    run.pause_at = pause_at
    try:
        return _carry_out(run)
    finally:
        release_state(run.engine.optimizer)
        if run.engine.streamed is not None:
            run.engine.streamed.close()


def _carry_out(run: Run) -> int:
    screen, stop = run.screen, run.stop
    with memory_explained(run):
        on_gpu = run.accelerator.device.type == "cuda" and run.recipe.engine.name == "native"
        if on_gpu:
            rehearse(run)
        first_measurements(run)
        begin_sharding(run.engine)
        reason = train_loop(run)
        while reason == STAGE_OVER:
            begin_stage(run, run.state.stage + 1)
            if on_gpu:
                rehearse(run)
            reason = train_loop(run)
    if reason == PAUSED:
        pause(run)
        return 0
    if stop() and reason == stop.name:
        saved = save_checkpoint(run)
        run.tracking.event("stop", step=run.state.step, reason=reason)
        live_report(run)
        run.tracking.finish()
        where = f" in {saved}" if saved else ""
        screen.note(f"{reason}: saved step {run.state.step}{where}; the same command goes on from there")
        return stop.exit_code
    run.snapshots.settle()  # the shards that it copies are about to be dissolved
    end_sharding(run.engine)
    finish(run, reason)
    return 0
