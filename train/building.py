"""Every part of a run, from its recipe and what an earlier process of it has left."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..checkpoint import Checkpoint, check_identity, open_checkpoint, run_identity
from ..data import Order
from ..models import load_tokenizer, read_facts
from ..recipes import DistillObjective, Recipe, Resolved
from ..schedules import Clock, Limits, energy_counters
from .assembly import build_engine, fingerprint, teacher_of
from .budget_file import BudgetFile
from .environment import describe_environment
from .following import weight_decay_follower
from .headline import headline
from .landing import begin_stage
from .legs import leg_schedule, read_legs
from .measuring import eval_kind
from .meters import Memory, gpu_uuids
from .objectives import LossModule, build_objective
from .parts import Run, Stage, State
from .pruned import prune_first
from .pruning_rounds import begin_rounds
from .restore import (
    MAY_CHANGE,
    as_saved,
    begin_leg,
    build_clock,
    load_weights,
    other_processes,
    restore_clock,
    set_generators,
)
from .rundir import RunDir
from .screen import Screen
from .signals import StopRequest
from .snapshots import Snapshots
from .stages import StagePlan, plan_stages
from .streaming import order_arguments
from .trackers import open_trackers
from .tracking import Tracking


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
    checkpoint = snapshots.newest()
    asked = recipe.model_dump(mode="json")
    recipe, facts = prune_first(recipe, facts, tokenizer, accelerator, run_dir, screen)
    plans = plan_stages(recipe, facts, tokenizer, accelerator, run_dir, checkpoint, started, screen)
    identity = run_identity(
        asked,
        data="+".join(fingerprint(stage.data.train) for stage in plans),
        base=facts.fingerprint,
        world_size=accelerator.num_processes,
    )
    trainer: dict[str, Any] = {}
    state = State()
    if checkpoint is not None:
        with as_saved(checkpoint):
            trainer = checkpoint.json("trainer")
            check_identity(trainer["identity"], identity, output_dir=run_dir.path, allow=MAY_CHANGE)
            state = State(**trainer["state"])
            if state.step != checkpoint.step:
                raise ValueError("another step than its name")

    budget_file = BudgetFile(run_dir.budget, legs[-1].given if legs else recipe.budget)
    budget = budget_file.poll() or budget_file.given
    schedule = leg_schedule(recipe.schedule, legs)
    with as_saved(checkpoint):
        new_leg = checkpoint is not None and int(trainer["clock"].get("leg", 0)) < len(legs)
    clock = build_clock(Limits.from_recipe(budget), plans, schedule, counters, started, new_leg=new_leg)
    notes = [budget_file.take_warning(), other_processes(trainer, accelerator)]
    if checkpoint is not None:
        with as_saved(checkpoint):
            notes.append(restore_clock(clock, trainer["clock"], run_dir))
    if new_leg:
        clock.extend(Limits.from_recipe(budget))
        notes = notes[:2]
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
    begin_rounds(run, facts.max_positions)
    snapshots.begin(clock, wanted=run.plan.snapshot_bytes > 0)
    if checkpoint is None:
        begin_stage(run, 0)
        return run
    if isinstance(checkpoint, Checkpoint):
        state.last_saved = state.step
    if new_leg:
        begin_leg(run)
    else:
        with as_saved(checkpoint):
            run.eval_due.load_state_dict(trainer["eval_due"])
            run.save_due.load_state_dict(trainer["save_due"])
    source = checkpoint if not new_leg else open_checkpoint(run_dir.path / legs[-1].source)
    with as_saved(source):
        load_weights(run, source)
        lines = set_generators(checkpoint, run)
    for line in lines:
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
