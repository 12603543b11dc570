"""From a recipe to a finished run: the parts in the order in which they are built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..checkpoint import Checkpoint, check_identity, open_checkpoint, run_identity, set_random_state
from ..data import Order
from ..models import load_tokenizer, read_facts
from ..ops import bound_kernel_cache, keep_freed_memory
from ..ops.memory import map_large_blocks
from ..recipes import DistillObjective, Recipe, Resolved, load_recipe
from ..schedules import Clock, Limits, energy_counters
from .assembly import build_engine, fingerprint, teacher_of
from .budget_file import BudgetFile
from .engines import check_engine
from .environment import describe_environment
from .following import weight_decay_follower
from .headline import headline
from .landing import begin_stage, finish, first_measurements, live_report, pause
from .legs import leg_schedule, read_legs
from .loop import train_loop
from .measuring import eval_kind
from .meters import Memory, gpu_uuids
from .objectives import LossModule, build_objective
from .offloading import release_state
from .parts import PAUSED, STAGE_OVER, Run, Stage, State
from .rehearsal import memory_explained, rehearse
from .restore import begin_leg, build_clock, load_weights, restore_clock
from .rundir import RunDir
from .saving import save_checkpoint
from .screen import Screen, quiet_libraries
from .sharded import begin_sharding, end_sharding
from .signals import StopRequest, stop_on_signals
from .snapshots import Snapshots, open_snapshots
from .stages import StagePlan, plan_stages
from .streaming import order_arguments
from .trackers import open_trackers
from .tracking import Tracking


def train_recipe(
    source: str, overrides: Sequence[str], *, fresh: bool, started: float, pause_at: float | None = None
) -> int:
    """Carry out a recipe; returns the exit code: 0 landed or paused, 130 or 143 saved after a signal.

    started: of the user's command, on time.monotonic's axis. pause_at: progress at which the run is measured,
    saved and left. Raises ShoestringError of the fitting kind.
    """
    resolved = load_recipe(source, overrides)
    quiet_libraries()
    keep_freed_memory()
    if "disk" in (resolved.recipe.offload.optimizer, resolved.recipe.offload.weights):
        map_large_blocks()  # before the measurement of the plan
    bound_kernel_cache()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.device.type == "cpu":
        # Accelerate asks DeepSpeed where that is installed, which would say on stdout what it found.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
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
        snapshots = stack.enter_context(
            open_snapshots(resolved.recipe, run_dir, processes=accelerator.num_processes, warn=screen.warn)
        )
        if fresh and accelerator.is_main_process:
            snapshots.forget()  # first, lest the keeper writes what it holds into the empty directory
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
    end_sharding(run.engine)
    finish(run, reason)
    return 0


def build(
    resolved: Resolved,
    accelerator: Accelerator,
    run_dir: RunDir,
    screen: Screen,
    stop: StopRequest,
    snapshots: Snapshots,
    started: float,
) -> Run:
    """Every part of the run, restored from its newest whole state where there is one."""
    recipe = resolved.recipe
    counters = energy_counters(gpu_uuids=gather_object(gpu_uuids(accelerator.device)))

    screen.status("reading model and data")
    facts = read_facts(recipe.model)
    tokenizer = load_tokenizer(facts, recipe.model)
    legs = read_legs(run_dir.legs)
    checkpoint = snapshots.newest(run_dir)
    plans = plan_stages(recipe, facts, tokenizer, accelerator, run_dir, checkpoint, started, screen)
    identity = run_identity(
        recipe.model_dump(mode="json"),
        data="+".join(fingerprint(stage.data.train) for stage in plans),
        base=facts.fingerprint,
        world_size=accelerator.num_processes,
    )
    trainer: dict[str, Any] = {}
    if checkpoint is not None:
        trainer = checkpoint.json("trainer")
        check_identity(trainer["identity"], identity, output_dir=run_dir.path, allow={"recipe.budget"})
    state = State(**trainer["state"]) if checkpoint is not None else State()

    budget_file = BudgetFile(run_dir.budget, legs[-1].given if legs else recipe.budget)
    budget = budget_file.poll() or budget_file.given
    schedule = leg_schedule(recipe.schedule, legs)
    new_leg = checkpoint is not None and int(trainer["clock"].get("leg", 0)) < len(legs)
    clock = build_clock(Limits.from_recipe(budget), plans, schedule, counters, started, new_leg=new_leg)
    notes = [budget_file.take_warning()]
    if checkpoint is not None:
        notes.append(restore_clock(clock, trainer["clock"], run_dir))
    if new_leg:
        clock.extend(Limits.from_recipe(budget))
        notes = notes[:1]
    if accelerator.is_main_process:
        if not legs:
            run_dir.write_recipe(resolved)
        for number, stage in enumerate(plans):
            run_dir.write_plan(stage.plan.to_json(), stage.name if number else None)
        run_dir.write_environment(describe_environment(device=str(accelerator.device)))
    title = "shoestring" if checkpoint is None else f"shoestring: resuming at step {state.step}"
    screen.start(headline(recipe, plans, run_dir, budget, legs), title=title)
    for note in notes:
        if note:
            screen.note(note)
    for stage in plans:
        for line in stage.data.report.lines():
            screen.note(line)
    tracking = _open_tracking(
        recipe,
        run_dir,
        screen,
        clock,
        trainer.get("tracking"),
        state.step,
        active=accelerator.is_main_process,
    )
    tracking.event("resume" if checkpoint else "start", step=state.step)

    first = plans[0]
    teacher = None
    if isinstance(recipe.objective, DistillObjective):
        with clock.spent("teacher"), tracking.timed("teacher"):
            teacher = teacher_of(recipe, recipe.objective, first.plan, facts, first.data, accelerator, screen)
    screen.status("loading the model")
    with clock.spent("load"), tracking.timed("load"):
        engine, done = build_engine(
            first.recipe, first.plan, facts, first.data, accelerator, checkpoint, teacher=teacher
        )
    for line in done:
        tracking.event("fused", text=line)
        screen.note(line)
    stages = [_stage(number, plan, engine.loss_module, recipe) for number, plan in enumerate(plans)]
    follower = weight_decay_follower(engine.optimizer, recipe.schedule)
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        engine=engine,
        tokenizer=tokenizer,
        schedule=schedule,
        clock=clock,
        stages=stages,
        run_dir=run_dir,
        tracking=tracking,
        screen=screen,
        memory=Memory(accelerator.device, (lambda: clock.joules) if counters else None),
        stop=stop,
        identity=identity,
        eval_due=clock.cadence(recipe.eval.every, eval_kind(stages, stages[state.stage])),
        save_due=clock.cadence(recipe.checkpoint.every, "save"),
        budget_file=budget_file,
        snapshots=snapshots,
        legs=legs,
        followers=[follower] if follower is not None else [],
        state=state,
        resumed_from=checkpoint.name if checkpoint else None,
    )
    snapshots.begin(clock, wanted=run.plan.snapshot_bytes > 0)
    if checkpoint is None:
        begin_stage(run, 0)
        return run
    if isinstance(checkpoint, Checkpoint):
        state.last_saved = state.step
    if new_leg:
        begin_leg(run)
    else:
        run.eval_due.load_state_dict(trainer["eval_due"])
        run.save_due.load_state_dict(trainer["save_due"])
    source = checkpoint if not new_leg else open_checkpoint(run_dir.path / legs[-1].source)
    load_weights(run, source)
    for line in set_random_state(checkpoint.json("random")[accelerator.process_index]):
        screen.warn(line)
    return run


def _stage(number: int, plan: StagePlan, module: LossModule, recipe: Recipe) -> Stage:
    objective = (
        module.objective
        if number == 0
        else build_objective(plan.recipe.objective, module.model, adapter=recipe.adapter)
    )
    seed = recipe.train.seed if recipe.data.seed is None else recipe.data.seed
    return Stage(
        name=plan.name,
        objective=objective,
        data=plan.data,
        plan=plan.plan,
        order=Order(plan.data.train, seed=seed, **order_arguments(recipe, plan.plan)),
        end=plan.end,
    )


def _open_tracking(
    recipe: Recipe,
    run_dir: RunDir,
    screen: Screen,
    clock: Clock,
    saved: dict[str, Any] | None,
    step: int,
    *,
    active: bool,
) -> Tracking:
    """The log, and the trackers that the recipe names; only the main process has any."""
    trackers = None
    if active:
        trackers = open_trackers(
            recipe.track.report_to,
            folder=run_dir.path,
            project=recipe.track.project,
            run_name=recipe.track.run_name or run_dir.name,
            config=recipe.model_dump(mode="json"),
            state=saved,
            after_step=step,
        )
        for line in trackers.lines:
            screen.note(line)
        for line in trackers.warnings:
            screen.warn(line)
    return Tracking(run_dir, seconds=lambda: clock.seconds, after_step=step, trackers=trackers, active=active)
