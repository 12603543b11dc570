"""`shoestring export`: any checkpoint of a run as a merged model or an adapter, checked by loading it."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console

from ..checkpoint import Checkpoint, newest, open_checkpoint
from ..data import prepare
from ..models import load_tokenizer, read_facts
from ..plan import Plan
from ..recipes import SftObjective
from ..recipes.errors import UserError
from .assembly import build_engine, takes_pairs
from .export import export_final
from .inspect import run_recipe
from .landing import probe_tokens
from .quiet import quiet_libraries
from .restore import as_saved
from .rundir import kept


def export_run(run: Path, *, to: str, checkpoint: str, output: Path | None) -> None:
    """Rebuild the model of `run`, restore a checkpoint's weights, export to `output` (default RUN/export-TO).

    Raises UserError for a folder that is no run, an unknown target, or a checkpoint that is not there.
    """
    if to not in ("merged", "adapter"):
        raise UserError(f"--to {to} is not an export.  Allowed: merged, adapter")
    quiet_libraries()
    trained = run_recipe(run)
    # No loss is computed: what the run minimised may need a reference or a teacher.
    recipe = trained.model_copy(update={"objective": SftObjective()})
    if to == "adapter" and recipe.adapter is None:
        raise UserError(f"{run} trained every weight and has no adapter.  Try: --to merged")
    if not (run / "plan.json").is_file():
        raise UserError(
            f"{run} has lost its plan.json, which says how its model was built.\n"
            "  Copy it back from where the run came from.  final/, if the run finished, needs none."
        )
    console = Console(highlight=False)
    chosen = _choose(run, checkpoint, console)
    facts = read_facts(recipe.model)
    tokenizer = load_tokenizer(facts, recipe.model)
    data = prepare(
        recipe.data,
        tokenizer,
        seed=recipe.train.seed,
        max_length=facts.max_positions,
        preferences=takes_pairs(trained),
    )
    with kept(run / "plan.json") as text:
        plan = Plan.from_json(text)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    engine, _ = build_engine(recipe, plan, facts, data, accelerator, chosen)
    with as_saved(chosen):
        parts = {name: chosen.tensors(name) for name in ("trained", "optimizer")}
        engine.load_state_dict(parts, {"optimizer": chosen.json("optimizer")})
    engine.end_training()
    exported = export_final(
        engine.loss_module.model,
        tokenizer,
        output or run / f"export-{to}",
        merged=to == "merged",
        probe=probe_tokens(data.eval if len(data.eval) else data.train),
        card=f"# {run.name}\n\n{chosen.path.name} of a shoestring run on {facts.source}, exported as {to}.\n",
        autocast=plan.autocast,
    )
    console.print(exported.line, markup=False)


def _choose(run: Path, name: str, console: Console) -> Checkpoint:
    if name != "last":
        return open_checkpoint(run / name)
    found = newest(run, lambda line: console.print(line, markup=False))
    if found is None:
        raise UserError(f"{run} has no checkpoint yet.")
    return found
