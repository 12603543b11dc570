"""The stages of a recipe: which objective trains on which rows for which share of the budget, with a plan for
each.

Most recipes have one. `sft_then_dpo` has two, and where one ends the next goes on with the same weights and
the same optimizer, its own rows, batch, rate and schedule.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator

from ..data import Prepared
from ..models import ModelFacts
from ..plan import Plan, Split, choose_split
from ..plan.defaults import DPO_RATE
from ..recipes import DpoObjective, Recipe, SftObjective, SftThenDpoObjective
from .assembly import decide, read_data
from .parts import Saved
from .rundir import RunDir, kept, write_json
from .screen import Screen

HELD_OUT_PAIRS = 0.1
"""Share of the pairs held out where the recipe names files for the rows' evaluation."""

Draft = tuple[str, Recipe, Prepared]
"""A stage before it is planned: name, recipe as if it were a run of its own, rows."""


@dataclass(frozen=True)
class StagePlan:
    """One stage before anything is loaded. end: progress through the budget at which it is over."""

    name: str
    recipe: Recipe
    data: Prepared
    plan: Plan
    end: float


def stage_recipes(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Name and recipe of each stage, as if it were a run of its own."""
    objective = recipe.objective
    if not isinstance(objective, SftThenDpoObjective):
        return [(objective.name, recipe)]
    first = recipe.model_copy(update={"objective": SftObjective()})
    shared = {name: getattr(objective, name) for name in ("beta", "label_smoothing", "sft_weight")}
    # The first stage has moved the adapter, so the base alone is no longer the reference.
    pairs = DpoObjective(**shared, reference=objective.reference or "frozen")
    held_out = recipe.data.eval if isinstance(recipe.data.eval, float) else HELD_OUT_PAIRS
    data = recipe.data.model_copy(
        update={"train": recipe.data.preferences, "eval": held_out, "format": None, "columns": None}
    )
    return [("sft", first), ("dpo", recipe.model_copy(update={"objective": pairs, "data": data}))]


def divide(
    recipe: Recipe,
    drafts: list[Draft],
    make: Callable[[Recipe, Prepared, float], Plan],
    split: Split | None = None,
) -> tuple[Split, list[tuple[Draft, Plan]]]:
    """The split of the budget, and the stages that have a share of it, each with its plan.

    make: plans a stage from its recipe, rows and share. split: of an earlier start, kept.
    """
    if not isinstance(recipe.objective, SftThenDpoObjective):
        (draft,) = drafts
        return Split(1.0, ""), [(draft, make(draft[1], draft[2], 1.0))]
    (_, first, rows), (_, _, pairs) = drafts
    if split is None:
        whole = make(first, rows, 1.0)
        split = choose_split(
            len(rows.train),
            len(pairs.train),
            len(pairs.train.tokens),
            whole.tokens_in_budget,
            recipe.objective.split,
            sft_tokens=len(rows.train.tokens),
        )
    planned: list[tuple[Draft, Plan]] = []
    for (name, part, data), share in zip(drafts, (split.share, 1.0 - split.share), strict=True):
        if share > 0:
            plan = make(part, data, share)
            if name == "dpo":
                plan = replace(plan, learning_rate=_dpo_rate(recipe.objective, planned[0][1]))
            plan = replace(plan, reasons={"objective.split": split.reason, **plan.reasons})
            planned.append(((name, part, data), plan))
    return split, planned


def _dpo_rate(objective: SftThenDpoObjective, sft: Plan) -> float:
    return (
        DPO_RATE * sft.learning_rate if objective.dpo_learning_rate is None else objective.dpo_learning_rate
    )


def plan_stages(
    recipe: Recipe,
    facts: ModelFacts,
    tokenizer: Any,
    accelerator: Accelerator,
    run_dir: RunDir,
    checkpoint: Saved | None,
    started: float,
    screen: Screen,
) -> list[StagePlan]:
    """Rows and plan of every stage; a resumed run keeps the plans and the split that it began with."""
    drafts = [
        (name, part, read_data(part, facts, tokenizer, accelerator)) for name, part in stage_recipes(recipe)
    ]

    def make(part: Recipe, data: Prepared, share: float) -> Plan:
        path = run_dir.plan_of(None if part is drafts[0][1] else drafts[1][0])
        saved = path if checkpoint is not None and path.exists() else None
        return decide(part, facts, data, accelerator, run_dir, saved, started, screen, share=share)

    before = None
    if checkpoint is not None and run_dir.stages.exists():
        with kept(run_dir.stages) as text:
            before = Split(**json.loads(text))
    split, planned = divide(recipe, drafts, make, before)
    if split.warning and before is None:
        screen.warn(split.warning)
    if len(drafts) > 1 and accelerator.is_main_process:
        write_json(run_dir.stages, split)
    stages = []
    for number, ((name, part, data), plan) in enumerate(planned):
        if plan.max_length < plan.longest_row:
            data = read_data(part, facts, tokenizer, accelerator, max_length=plan.max_length)
        end = split.share if number + 1 < len(planned) else 1.0
        stages.append(StagePlan(name, part, data, plan, end))
    return stages
