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
from ..recipes import Recipe, load_recipe
from ..recipes.errors import UserError
from .chat import load_final
from .quiet import quiet_libraries


def check_recipe(source: str, overrides: Sequence[str]) -> None:
    """Schema, files, tokenizer and masks, with coloured samples; loads no weights.

    Raises UserError for whatever training would have stumbled over.
    """
    quiet_libraries()
    console = Console(highlight=False)
    _, _, tokenizer, data = _read(source, overrides)
    for line in data.report.lines():
        console.print(line, markup=False)
    console.print(describe(data, tokenizer))
    console.print(f"{source} is sound.  Next: shoestring plan {source}", markup=False)


def show_plan(source: str, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print what the run would decide and cost; raises BudgetError where it cannot fit."""
    quiet_libraries()
    from ..plan import data_facts, make_plan, probe
    from ..plan.show import render

    recipe, facts, _, data = _read(source, overrides)
    machine = probe(recipe.output_dir)
    plan = make_plan(recipe, machine, facts, data_facts(data.train, data.eval), world_size=1)
    if as_json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        Console(highlight=False).print(render(plan))


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
    model, tokenizer = load_final(run)
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
        LossModule(model, build_objective(recipe.objective, model)),
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


def _read(source: str, overrides: Sequence[str]) -> tuple[Recipe, ModelFacts, Any, Prepared]:
    recipe = load_recipe(source, overrides).recipe
    facts = read_facts(recipe.model)
    tokenizer = load_tokenizer(facts, recipe.model)
    data = prepare(recipe.data, tokenizer, seed=recipe.train.seed, max_length=facts.max_positions)
    return recipe, facts, tokenizer, data
