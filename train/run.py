"""From a recipe to a finished run: the parts in the order in which they are built."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from ..adapters import attach
from ..checkpoint import Checkpoint, check_identity, newest, run_identity, set_random_state
from ..data import Order, Prepared, TokenRows, collate, prepare
from ..models import (
    ModelFacts,
    load_model,
    load_tokenizer,
    read_facts,
    use_packed_attention,
    weight_reader,
)
from ..ops import bound_kernel_cache, keep_freed_memory, use_fused
from ..optimizers import build_optimizer
from ..plan import Plan, data_facts, make_plan, probe
from ..recipes import Recipe, Resolved, load_recipe
from ..recipes.errors import BudgetError
from ..schedules import Clock, Limits, build_schedule, energy_counters
from .engine import NativeEngine
from .environment import describe_environment
from .landing import finish, first_measurements, live_report
from .loop import Run, State, save_checkpoint, train_loop
from .meters import Memory, gpu_uuids
from .objectives import LossModule, base_model, build_objective
from .rundir import RunDir
from .screen import Headline, Screen, quiet_libraries
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
    plan = _plan(recipe, facts, data, accelerator, run_dir, checkpoint, started, screen)
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
    trackers = (
        open_trackers(
            recipe.track.report_to,
            folder=run_dir.path,
            project=recipe.track.project,
            run_name=recipe.track.run_name or run_dir.name,
            config=recipe.model_dump(mode="json"),
            state=trainer.get("tracking"),
            after_step=state.step,
        )
        if accelerator.is_main_process
        else None
    )
    tracking = Tracking(
        run_dir,
        seconds=lambda: clock.seconds,
        after_step=state.step,
        trackers=trackers,
        active=accelerator.is_main_process,
    )
    tracking.event("resume" if checkpoint else "start", step=state.step)
    if not run_dir.resolved.exists() or checkpoint is None:
        screen.start(headline(recipe, plan, data, run_dir))
    else:
        screen.start(
            headline(recipe, plan, data, run_dir), title=f"shoestring: resuming at step {state.step}"
        )
    for line in [*data.report.lines(), *(trackers.lines if trackers else [])]:
        screen.note(line)
    for line in trackers.warnings if trackers else []:
        screen.warn(line)

    screen.status("loading the model")
    with clock.spent("load"), tracking.timed("load"):
        engine, fused = build_engine(recipe, plan, facts, data, accelerator, checkpoint)
    for line in fused:
        tracking.event("fused", text=line)
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


def build_engine(
    recipe: Recipe,
    plan: Plan,
    facts: ModelFacts,
    data: Prepared,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> tuple[NativeEngine, list[str]]:
    """The model with its adapter, its loss and its optimizer; and a line for each kind of fused module."""
    set_seed(recipe.train.seed)
    device = accelerator.device
    model = load_model(facts, recipe.model, device=device, dtype=getattr(torch, plan.dtype))
    if plan.packed:
        use_packed_attention(model)
    adapter = recipe.adapter
    loftq = adapter is not None and adapter.init_lora_weights == "loftq"
    trained = attach(
        model,
        adapter,
        facts,
        seed=recipe.train.seed,
        eva_batches=_eva_batches(recipe, plan, data, device),
        original_weight=weight_reader(facts) if loftq and recipe.model.load_in_4bit else None,
        saved=checkpoint.path if checkpoint is not None and adapter is not None else None,
        checkpointing="non_reentrant" if plan.activation_checkpointing else "none",
    )
    fused = use_fused(trained) if recipe.train.fused_ops else []
    trained.to(device)
    if plan.activation_checkpointing:
        base_model(trained).gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    objective = build_objective(recipe.objective, trained)
    optimizer = build_optimizer(
        trained, recipe.optimizer, loraplus_lr_ratio=adapter.loraplus_lr_ratio if adapter else None
    )
    return NativeEngine(accelerator, LossModule(trained, objective), optimizer, plan.autocast), fused


def read_data(
    recipe: Recipe, facts: ModelFacts, tokenizer: Any, accelerator: Accelerator, max_length: int | None = None
) -> Prepared:
    """The rows; the main process prepares them first, the others find them in the cache."""
    section = recipe.data
    if max_length is not None:
        section = section.model_copy(update={"max_length": max_length})
    with accelerator.main_process_first():
        return prepare(section, tokenizer, seed=recipe.train.seed, max_length=facts.max_positions)


def fingerprint(rows: TokenRows) -> str:
    """Identity of the training rows: their tokens, which of them are trained, and where each row ends."""
    digest = xxhash.xxh3_128()
    for array in (rows.tokens, rows.trained, rows.offsets):
        digest.update(array.data)
    return digest.hexdigest()


def headline(recipe: Recipe, plan: Plan, data: Prepared, run_dir: RunDir) -> Headline:
    """What will happen, for the screen."""
    budget = recipe.budget
    given = [
        f"{name} {getattr(value, 'text', value)}"
        for name, value in budget
        if value is not None and name in ("time", "cost", "price", "energy", "tokens", "steps", "epochs")
    ]
    limits = {tier: (sum_, plan.memory_limits.get(tier)) for tier, sum_ in _totals(plan).items()}
    return Headline(
        model=plan.model,
        trained_parameters=plan.trained_parameters,
        parameters=plan.parameters,
        data=f"{len(data.train):,} rows, {data.report.train_tokens:,} tokens, "
        f"{data.report.trained_share:.0%} trained",
        budget=", ".join(given),
        tokens=plan.tokens_in_budget,
        finish_seconds=plan.finish_seconds,
        device=f"{plan.machine}" if plan.device == "cpu" else f"{plan.machine} ({plan.device})",
        memory=limits,
        output_dir=str(run_dir.path),
        more=[
            (
                "steps",
                f"about {plan.steps:,} of {plan.batch_rows or plan.batch_tokens:,} "
                f"{'rows' if plan.batch_rows else 'tokens'}, {plan.epochs:.2g} epochs, "
                f"peak rate {plan.learning_rate:.1e}, {recipe.schedule.name}",
            )
        ],
    )


def _totals(plan: Plan) -> dict[str, int]:
    return {tier: parts["total"] for tier, parts in plan.memory.items() if parts}


def _plan(
    recipe: Recipe,
    facts: ModelFacts,
    data: Prepared,
    accelerator: Accelerator,
    run_dir: RunDir,
    checkpoint: Checkpoint | None,
    started: float,
    screen: Screen,
) -> Plan:
    """Made by the main process and sent to the others; a resumed run keeps the plan that it began with."""
    holder: list[Any] = [None]
    if accelerator.is_main_process:
        if checkpoint is not None and run_dir.plan.exists():
            plan = Plan.from_json(run_dir.plan.read_text(encoding="utf-8"))
        else:
            screen.status("measuring a small copy of the model")
            machine = probe(run_dir.path, device=str(accelerator.device))
            elapsed = Clock(Limits(seconds=float("inf")), started=started).seconds
            plan = make_plan(
                recipe,
                machine,
                facts,
                data_facts(data.train, data.eval),
                world_size=accelerator.num_processes,
                elapsed=elapsed,
            )
        holder = [plan.to_json()]
    if accelerator.num_processes > 1:
        broadcast_object_list(holder)
    return Plan.from_json(holder[0])


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


def _eva_batches(
    recipe: Recipe, plan: Plan, data: Prepared, device: torch.device
) -> list[dict[str, Any]] | None:
    """Rows for EVA's look at the activations; padded, since PEFT reads an attention mask."""
    if recipe.adapter is None or recipe.adapter.init_lora_weights != "eva":
        return None
    batches = []
    for start in range(0, min(64, len(data.train)), 4):
        batch = collate(data.train, list(range(start, min(start + 4, len(data.train)))), packed=False).to(
            device
        )
        labels = torch.full_like(batch.input_ids, -100)
        length = batch.input_ids.shape[1]
        labels[batch.targets // length, batch.targets % length] = batch.labels
        batches.append(
            {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
        )
    return batches
