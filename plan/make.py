"""`make_plan`: from recipe, machine, model and data facts to a Plan, or to a refusal with the numbers."""

from __future__ import annotations

from ..models.attention import supports_packing
from ..models.facts import ModelFacts
from ..recipes import Recipe, SvfitAdapter
from ..schedules.limits import Limits
from . import defaults
from .alternatives import refuse
from .budget import Spending, choose_batch, deadline_of, spend
from .evaluations import EvalRows, choose_eval_rows
from .facts import DataFacts
from .fit import Candidate
from .fit import Limits as MemoryLimits
from .grounds import Grounds, MeasureCopy, Surroundings
from .machine import Machine
from .objectives import teacher_facts
from .offload_placement import place
from .offload_writes import check_disk, check_writes, predict_writes, scratch_bytes
from .plan import Plan
from .reasons import Decisions, explain
from .repetition import repeats_of, weight_decay_for
from .search import pick
from .seconds import Fixed, StepTime, fixed_seconds, step_time
from .sizes import checkpoint_bytes, measures_first, resident_bytes
from .snapshots import snapshot_bytes


def make_plan(
    recipe: Recipe,
    machine: Machine,
    facts: ModelFacts,
    data: DataFacts,
    *,
    world_size: int,
    elapsed: float = 0.0,
    measure: MeasureCopy | None = None,
    libraries: int | None = None,
    can_pack: bool | None = None,
    share: float = 1.0,
) -> Plan:
    """Decide everything that can be decided before a step is made.

    share: of the budget's training, in (0, 1], for a stage of a run that has several; its recipe names its
    own objective and `data` holds its own rows. Evaluations, saves and export are planned as for the whole.
    elapsed: seconds since the process started. measure, libraries and can_pack replace the short measurement,
    the resident bytes before the model is loaded, and the trial of packing (tests give them).

    Raises:
        ValueError: a share outside (0, 1], or sft_then_dpo, whose stages are planned one by one.
        BudgetError: it fits no memory, disk or time budget; with the parts and the cheapest changes.
        UserError: no rows, a teacher that cannot be used, or packing asked for where it is impossible.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is {share}, and must be above 0 and at most 1")
    if measure is None:
        from .measure import measure as measure_copy

        measure = measure_copy
    libraries = resident_bytes() if libraries is None else libraries
    around = Surroundings(
        machine=machine,
        facts=facts,
        data=data,
        world_size=world_size,
        libraries=libraries,
        limits=memory_limits(recipe, machine, world_size=world_size, libraries=libraries),
        measure=measure,
        can_pack=supports_packing(facts) if can_pack is None else can_pack,
        teacher=teacher_facts(recipe),
    )
    grounds, chosen = _fit_memory(recipe, around)
    limits = Limits.from_recipe(recipe.budget)
    limits.check(energy_measured=machine.watts_source is not None)
    return _fill(recipe, grounds, chosen, limits, elapsed, share)


def memory_limits(recipe: Recipe, machine: Machine, *, world_size: int, libraries: int) -> MemoryLimits:
    """Bytes that one process may use: the recipe's limit where it is below what is free.

    What this process holds already counts as free, for it is part of the prediction.
    """

    def limit(given: int | None, free: int, key: str) -> tuple[int, str]:
        return (int(given), f"budget.{key}") if given is not None and given < free else (free, "free now")

    host, host_source = limit(recipe.budget.host_memory, machine.host_bytes + libraries, "host_memory")
    device, device_source = limit(recipe.budget.device_memory, machine.device_bytes, "device_memory")
    return MemoryLimits(host // world_size, device, host_source, device_source)


def _fit_memory(recipe: Recipe, around: Surroundings) -> tuple[Grounds, Candidate]:
    """What fits, with rows cut as a last resort where data.max_length is automatic."""
    grounds = Grounds(recipe, around)
    chosen = pick(grounds)
    if chosen is not None:
        return grounds, chosen
    if recipe.data.max_length is None:
        length = grounds.layout.max_length // 2
        while length >= defaults.DEFAULT_MAX_LENGTH:
            shorter = Grounds(recipe, around, max_length=length)
            chosen = pick(shorter)
            if chosen is not None:
                return shorter, chosen
            length //= 2
    raise refuse(grounds)


def _fill(
    recipe: Recipe,
    grounds: Grounds,
    chosen: Candidate,
    limits: Limits,
    elapsed: float,
    share: float,
) -> Plan:
    around, data, sizes = grounds.around, grounds.data, grounds.sizes_on(chosen.tier)
    machine, facts, world_size = around.machine, around.facts, around.world_size
    work = grounds.work_of(chosen)
    rates = machine.rates
    update = grounds.update_seconds(chosen.tier)
    passes = 2 if measures_first(recipe) else 1
    per_token = passes * chosen.seconds_per_token / world_size
    trained_share = data.trained_share

    def step_of(batch: int) -> StepTime:
        return step_time(
            work,
            micro_tokens=chosen.micro_tokens,
            batch_tokens=batch,
            world_size=world_size,
            trained_share=trained_share,
            update_seconds=update,
            passes=passes,
        )

    def batch_for(tokens: float) -> tuple[int, str]:
        return choose_batch(
            recipe,
            data,
            tokens=tokens,
            steps_limit=None if limits.steps is None else max(1, int(limits.steps * share)),
            seconds_per_token=per_token,
            update_seconds=update,
            deadline=share * deadline,
            world_size=world_size,
            micro_tokens=chosen.micro_tokens,
            micro_rows=grounds.micro_rows,
        )

    deadline, _ = deadline_of(limits, grounds.watts)
    micro = chosen.micro_tokens
    eval_token = work.eval_seconds(micro, micro * trained_share) / micro / world_size
    rows = choose_eval_rows(recipe, data, expected_seconds=deadline, seconds_per_token=eval_token)
    fixed = fixed_seconds(
        sizes=sizes,
        rates=rates,
        layers=facts.layers,
        eval_seconds=rows.ends_seconds,
        eval_between_seconds=rows.between_seconds,
        samples=recipe.eval.samples,
        max_new_tokens=recipe.eval.max_new_tokens,
        teacher_seconds=grounds.teacher_tokens * work.teacher_seconds(micro, micro * trained_share) / micro,
        disk=grounds.disk_rates if chosen.tier == "disk" else None,
    )
    spending = spend(
        recipe,
        data,
        limits,
        fixed,
        watts=grounds.watts,
        elapsed=elapsed,
        batch_for=batch_for,
        step_of=step_of,
        seconds_per_token=per_token,
        share=share,
    )
    return _write(recipe, grounds, chosen, limits, rows, fixed, spending, update)


def _write(
    recipe: Recipe,
    grounds: Grounds,
    chosen: Candidate,
    limits: Limits,
    rows: EvalRows,
    fixed: Fixed,
    spending: Spending,
    update: float,
) -> Plan:
    around, data, sizes = grounds.around, grounds.data, grounds.sizes_on(chosen.tier)
    machine, facts = around.machine, around.facts
    step = spending.step
    micro_rows = grounds.micro_rows
    if micro_rows is None:
        # A step's tokens vary a little around the batch: room for that, so that no sliver of it is left over.
        most = -(-int(1.3 * step.tokens / around.world_size) // 64) * 64
        if most < chosen.micro_tokens:
            (chosen,) = grounds.find(chosen.recomputed, most, chosen.tier, chosen.swapped)
    rate = recipe.optimizer.learning_rate
    if rate is None:
        rate = defaults.learning_rate_for(
            adapter=recipe.adapter is not None,
            optimizer=recipe.optimizer.name,
            parameters=facts.parameters,
            batch_tokens=step.tokens,
            steps=spending.timeline.steps,
            pairs=recipe.objective.name == "dpo",
            svfit=isinstance(recipe.adapter, SvfitAdapter),
        )
    repeats = repeats_of(data, spending.timeline.tokens)
    decay = recipe.optimizer.weight_decay
    if decay is None:
        decay = weight_decay_for(
            repeats.epochs,
            adapter=recipe.adapter is not None,
            optimizer=recipe.optimizer.name,
            rate=rate,
            steps=spending.timeline.steps,
        )
    checkpoint = checkpoint_bytes(sizes)
    final = sizes.merged + sizes.exported + sizes.adapter_file
    kept = recipe.checkpoint.keep + 1 + int(recipe.checkpoint.keep_best)
    check_disk(
        recipe,
        machine,
        checkpoint=checkpoint,
        kept=kept,
        final=final,
        stored=grounds.stored_bytes,
        scratch=around.world_size * scratch_bytes(sizes),
    )
    files = (spending.saves + 1) * checkpoint + final + grounds.stored_bytes
    writes = predict_writes(recipe, sizes, spending, files=files, world_size=around.world_size)
    check_writes(recipe, writes, batch_tokens=step.tokens, epoch_tokens=data.tokens)
    placement = place(recipe, grounds, chosen)
    finish = spending.timeline.total
    price = limits.price_per_hour
    memory = {
        "device": dict(chosen.footprint.device),
        "host": dict(chosen.footprint.host),
    }
    snapshots = snapshot_bytes(recipe, sizes, chosen, around.limits, around.world_size)
    if snapshots:
        memory["host"]["snapshots"] = snapshots
    for parts in memory.values():
        if parts:
            parts["total"] = sum(parts.values())
    return Plan(
        model=facts.source,
        device=machine.device,
        machine=machine.name,
        world_size=around.world_size,
        parameters=facts.parameters + grounds.trained.added_parameters,
        trained_parameters=grounds.trained.parameters,
        optimizer_bytes=sizes.optimizer,
        dtype=grounds.precision.weights,
        autocast=grounds.precision.autocast,
        packed=grounds.layout.packed,
        max_length=grounds.layout.max_length,
        longest_row=around.data.longest_sequence,
        micro_tokens=chosen.micro_tokens,
        micro_rows=micro_rows,
        batch_tokens=step.tokens,
        batch_rows=_batch_rows(recipe, data, around.world_size),
        accumulation=step.accumulation,
        recomputed_layers=chosen.recomputed,
        swapped_layers=chosen.swapped,
        learning_rate=rate,
        eval_rows=rows.ends,
        eval_rows_between=rows.between,
        steps=spending.timeline.steps,
        tokens_in_budget=spending.timeline.tokens,
        epochs=spending.timeline.tokens / max(1, data.tokens),
        step_seconds=step.seconds,
        tokens_per_second=step.tokens_per_second,
        seconds_per_token=1 / step.tokens_per_second,
        update_seconds=update,
        finish_seconds=finish,
        timeline=spending.timeline.parts,
        reserve_guess=fixed.reserve_guess(),
        bound_by=spending.bound_by,
        cost=None if price is None else finish / 3600 * price,
        currency=None if recipe.budget.price is None else recipe.budget.price.currency,
        disk_bytes=files,
        memory=memory,
        memory_limits={"host": around.limits.host, "device": around.limits.device},
        phases=chosen.footprint.phases,
        reasons=explain(
            recipe,
            grounds,
            chosen,
            spending,
            rows,
            Decisions(limits, repeats, fixed, placement, writes, snapshots),
        ),
        weight_decay=decay,
        placement=placement,
        disk_writes=writes.total,
        snapshot_bytes=snapshots,
    )


def _batch_rows(recipe: Recipe, data: DataFacts, world_size: int) -> int | None:
    rows = recipe.train.per_device_train_batch_size
    if rows is None:
        return None
    return min(rows * (recipe.train.gradient_accumulation_steps or 1) * world_size, data.rows)
