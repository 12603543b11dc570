"""Verbs that look and change nothing: check, plan, eval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data import Prepared, describe, prepare
from ..models import ModelFacts, load_tokenizer, read_facts, use_packed_attention
from ..ops import use_fused
from ..plan import Plan
from ..recipes import Recipe, SftObjective, load_recipe
from ..recipes.errors import UserError
from .assembly import takes_pairs
from .chat import load_final
from .pruned import predicted_facts
from .quiet import quiet_libraries
from .stages import Draft, divide, stage_recipes


def check_recipe(source: str, overrides: Sequence[str]) -> None:
    """Schema, files, tokenizer and masks, with coloured samples; loads no weights.

    Raises UserError for whatever training would have stumbled over.
    """
    quiet_libraries()
    console = Console(highlight=False)
    _, _, tokenizer, stages = _read(source, overrides)
    for name, _, data in stages:
        if len(stages) > 1:
            console.rule(name)
        for line in data.report.lines():
            console.print(line, markup=False)
        console.print(describe(data, tokenizer))
    console.print(f"{source} is sound.  Next: shoestring plan {source}", markup=False)


def show_plan(source: str, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print what the run would decide and cost; raises BudgetError where it cannot fit."""
    quiet_libraries()
    from ..plan import data_facts, make_plan, probe
    from ..plan.show import render

    recipe, facts, _, stages = _read(source, overrides)
    machine = probe(recipe.output_dir)

    def plan(part: Recipe, data: Prepared, share: float) -> Plan:
        return make_plan(part, machine, facts, data_facts(data.train, data.eval), world_size=1, share=share)

    console = Console(highlight=False)
    split, planned = divide(recipe, stages, plan)
    if split.warning:
        console.print(split.warning, style="yellow", markup=False)
    if as_json:
        plans = {name: made.to_json() for (name, _, _), made in planned}
        print(json.dumps(plans if len(stages) > 1 else next(iter(plans.values())), indent=2))
        return
    for (name, _, _), made in planned:
        if len(stages) > 1:
            console.rule(name)
        console.print(render(made))


@torch.no_grad()
def evaluate_run(run: Path, other: str | None) -> None:
    """Held-out loss of a run's exported model, on its own held-out rows or on `other` data.

    Raises UserError when the folder is no run, or has no exported model.
    """
    from accelerate import Accelerator

    from .engine import NativeEngine
    from .evaluation import evaluate
    from .objectives import LossModule, build_objective

    recipe = run_recipe(run)
    if takes_pairs(recipe) and other is None:
        raise UserError(
            f"{run} trained on pairs, which are measured against the model before training: see its "
            f"report.html.\n  For the loss of other rows: shoestring eval {run} --data FILE"
        )
    model, tokenizer = load_final(run)
    own = recipe.objective if ":" in recipe.objective.name else SftObjective()
    # Other data: all of its rows are measured, so they are read as a held-out source.
    section = (
        recipe.data
        if other is None
        else recipe.data.model_copy(
            update={"eval": load_recipe(run / "resolved.yaml", [f"data.eval={other}"]).recipe.data.eval}
        )
    )
    data = prepare(
        section, tokenizer, seed=recipe.train.seed, max_length=model.config.max_position_embeddings
    )
    if not len(data.eval):
        raise UserError(f"{run}: no rows are held out.  Give some: shoestring eval {run} --data FILE")
    packed = use_packed_attention(model.get_base_model() if hasattr(model, "peft_config") else model)
    use_fused(model)
    some = next(model.parameters())  # an engine has an optimizer, if only of one tensor
    engine = NativeEngine(
        Accelerator(cpu=not torch.cuda.is_available()),
        LossModule(model, build_objective(own, model)),
        torch.optim.SGD([some], lr=0.0),
        autocast=False,
    )
    result = evaluate(
        engine,
        engine.accelerator,
        data.eval,
        compared=len(data.eval),
        micro_tokens=2048,
        micro_rows=None,
        packed=packed,
    )
    console = Console(highlight=False)
    console.print(
        f"{run / 'final'} on {result.rows:,} held-out rows, {result.trained_tokens:,} trained tokens:"
    )
    for name, value in result.metrics.items():
        console.print(f"  {name:12} {value:.4f}")


def run_recipe(run: Path) -> Recipe:
    """The recipe of a run directory. Raises UserError when the folder is no run."""
    resolved = run / "resolved.yaml"
    if not resolved.is_file():
        raise UserError(
            f"{run} is no run directory: it has no resolved.yaml.  Runs lie under runs/ by default."
        )
    return load_recipe(resolved).recipe


def _read(source: str, overrides: Sequence[str]) -> tuple[Recipe, ModelFacts, Any, list[Draft]]:
    recipe = load_recipe(source, overrides).recipe
    facts = predicted_facts(recipe, read_facts(recipe.model))
    tokenizer = load_tokenizer(facts, recipe.model)
    stages = [
        (
            name,
            part,
            prepare(
                part.data,
                tokenizer,
                seed=part.train.seed,
                max_length=facts.max_positions,
                preferences=takes_pairs(part),
            ),
        )
        for name, part in stage_recipes(recipe)
    ]
    return recipe, facts, tokenizer, stages
