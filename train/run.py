"""From a recipe to a finished run: the parts in the order in which they are built."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator

from ..checkpoint import check_identity, newest, run_identity, set_random_state
from ..data import Order
from ..models import load_tokenizer, read_facts
from ..ops import bound_kernel_cache, keep_freed_memory
from ..recipes import Recipe, Resolved, load_recipe
from ..recipes.errors import BudgetError
from ..schedules import Clock, Limits, build_schedule, energy_counters
from .assembly import build_engine, decide, fingerprint, headline, read_data
from .environment import describe_environment
from .landing import finish, first_measurements, live_report
from .loop import Run, State, save_checkpoint, train_loop
from .meters import Memory, gpu_uuids
from .rehearsal import memory_explained, rehearse
from .rundir import RunDir
from .screen import Screen, quiet_libraries
from .signals import StopRequest, stop_on_signals
from .trackers import open_trackers
from .tracking import Tracking, read_jsonl


def train_recipe(source: str, overrides: Sequence[str], *, fresh: bool, started: float) -> int:
    """Carry out a recipe; returns the exit code: 0 landed, 130 or 143 saved after a signal.

    started: of the user's command, on time.monotonic's axis. Raises ShoestringError of the fitting kind.
    """
    resolved = load_recipe(source, overrides)
    quiet_libraries()
    keep_freed_memory()
    bound_kernel_cache()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
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
            if fresh:
                run_dir.clear()
        accelerator.wait_for_everyone()
        if run_dir.summary.exists():
            screen.note(
                f"{run_dir.path} holds a finished run: {run_dir.report}\n"
                "Run it again from the start with --fresh, or into another folder with output_dir=runs/NAME"
            )
            return 0
        return _train(resolved, accelerator, run_dir, screen, stop, started)


def _train(
    resolved: Resolved,
    accelerator: Accelerator,
    run_dir: RunDir,
    screen: Screen,
    stop: StopRequest,
    started: float,
) -> int:
    run = build(resolved, accelerator, run_dir, screen, stop, started)
    with memory_explained(run):
        if accelerator.device.type == "cuda":
            rehearse(run)
        first_measurements(run)
        reason = train_loop(run)
    if stop() and reason == stop.name:
        saved = save_checkpoint(run)
        run.tracking.event("stop", step=run.state.step, reason=reason)
        live_report(run)
        run.tracking.finish()
        where = f" in {saved}" if saved else ""
        screen.note(f"{reason}: saved step {run.state.step}{where}; the same command goes on from there")
        return stop.exit_code
    finish(run, reason)
    return 0


def build(
    resolved: Resolved,
    accelerator: Accelerator,
    run_dir: RunDir,
    screen: Screen,
    stop: StopRequest,
    started: float,
) -> Run:
    """Every part of the run, restored from the newest whole checkpoint where there is one."""
    recipe = resolved.recipe
    counters = energy_counters(gpu_uuids=gpu_uuids(accelerator.device))

    def joules() -> float | None:
        return sum(counter.joules() for counter in counters) if counters else None

    screen.status("reading model and data")
    facts = read_facts(recipe.model)
    tokenizer = load_tokenizer(facts, recipe.model)
    data = read_data(recipe, facts, tokenizer, accelerator)
    identity = run_identity(
        recipe.model_dump(mode="json"),
        data=fingerprint(data.train),
        base=facts.fingerprint,
        world_size=accelerator.num_processes,
    )
    checkpoint = newest(run_dir.path, screen.warn) if run_dir.holds_run() else None
    if checkpoint is not None:
        check_identity(checkpoint.json("trainer")["identity"], identity, output_dir=run_dir.path)
    plan = decide(recipe, facts, data, accelerator, run_dir, checkpoint, started, screen)
    if plan.max_length < plan.longest_row:
        data = read_data(recipe, facts, tokenizer, accelerator, max_length=plan.max_length)

    schedule = build_schedule(recipe.schedule)
    clock = Clock(
        Limits.from_recipe(recipe.budget),
        started=started,
        joules=joules,
        reserve_guess=plan.reserve_guess,
        seconds_per_token_guess=plan.seconds_per_token,
        warmup=schedule.warmup,
    )
    state = State()
    trainer: dict[str, Any] = {}
    if checkpoint is not None:
        trainer = checkpoint.json("trainer")
        state = State(**trainer["state"])
        state.last_saved = state.step
        _restore_clock(clock, trainer["clock"], run_dir)
    if accelerator.is_main_process:
        run_dir.write_recipe(resolved)
        run_dir.write_plan(plan.to_json())
        run_dir.write_environment(describe_environment(device=str(accelerator.device)))
    title = "shoestring" if checkpoint is None else f"shoestring: resuming at step {state.step}"
    screen.start(headline(recipe, plan, data, run_dir), title=title)
    for line in data.report.lines():
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

    screen.status("loading the model")
    with clock.spent("load"), tracking.timed("load"):
        engine, fused = build_engine(recipe, plan, facts, data, accelerator, checkpoint)
    for line in fused:
        tracking.event("fused", text=line)
        screen.note(line)
    run = Run(
        recipe=recipe,
        plan=plan,
        accelerator=accelerator,
        engine=engine,
        tokenizer=tokenizer,
        schedule=schedule,
        clock=clock,
        order=Order(data.train, seed=_data_seed(recipe), **plan.order_arguments()),
        data=data,
        run_dir=run_dir,
        tracking=tracking,
        screen=screen,
        memory=Memory(accelerator.device, joules if counters else None),
        stop=stop,
        identity=identity,
        eval_due=clock.cadence(recipe.eval.every, "eval"),
        save_due=clock.cadence(recipe.checkpoint.every, "save"),
        state=state,
        resumed_from=checkpoint.path.name if checkpoint else None,
    )
    if checkpoint is not None:
        run.eval_due.load_state_dict(trainer["eval_due"])
        run.save_due.load_state_dict(trainer["save_due"])
        parts = {name: checkpoint.tensors(name) for name in ("trained", "optimizer")}
        engine.load_state_dict(parts, {"optimizer": checkpoint.json("optimizer")})
        for line in set_random_state(checkpoint.json("random")[accelerator.process_index]):
            screen.warn(line)
    return run


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


def _restore_clock(clock: Clock, saved: dict[str, Any], run_dir: RunDir) -> None:
    """Also count what the stopped process spent after its last checkpoint, as far as its log tells."""
    log = read_jsonl(run_dir.metrics)
    lost = max(0.0, float(log[-1]["seconds"]) - float(saved["seconds"])) if log else 0.0
    try:
        clock.load_state_dict(saved, lost_seconds=lost)
    except BudgetError:
        clock.load_state_dict(saved)  # nothing is left to train with, but it can still land


def _data_seed(recipe: Recipe) -> int:
    return recipe.train.seed if recipe.data.seed is None else recipe.data.seed
