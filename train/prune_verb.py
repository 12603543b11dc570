"""`shoestring prune`: the pruned model of a recipe, and what it costs and gains, measured on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..data import TokenRows
from ..models import load_model, load_tokenizer, read_facts
from ..recipes import Recipe, SftObjective, load_recipe
from ..recipes.errors import UserError
from .assembly import read_data, takes_pairs
from .engine import NativeEngine
from .evaluation import evaluate
from .figures import bytes_text, count_text, duration_text
from .landing import probe_tokens
from .objectives import LossModule, build_objective
from .pruned import FOLDER, is_there, load_dense, prunes_before, trained_recipe, write_pruned
from .quiet import choose_deepspeed_device, quiet_libraries
from .rundir import RunDir
from .stages import stage_recipes

_ROWS = 64
"""Held-out rows that the loss is measured on, at most."""
_TURNS = 7


def prune_recipe(source: str, overrides: Sequence[str], *, fresh: bool) -> None:
    """Write the pruned model to `pruned` in the run directory, where training will find it; print a table.

    Raises UserError where the recipe prunes nothing, or the folder holds another pruned model.
    """
    recipe = load_recipe(source, overrides).recipe
    if recipe.pruning is None:
        raise UserError(
            f"pruning: {source} prunes nothing.\n"
            f"  Say how much: shoestring prune {source} pruning.ratio=0.2 pruning.name=cfsp"
        )
    if not prunes_before(recipe):
        raise UserError(
            f"pruning: {source} prunes while it trains, in rounds.\n"
            f"  To prune at once, before training: shoestring prune {source} pruning.start=0"
        )
    quiet_libraries()
    console = Console(highlight=False)
    facts = read_facts(recipe.model)
    tokenizer = load_tokenizer(facts, recipe.model)
    run_dir = RunDir(recipe.output_dir)
    folder = run_dir.path / FOLDER
    with run_dir.lock():
        if not fresh and is_there(recipe, facts, folder):
            console.print(f"{folder} holds this pruned model already; --fresh makes it anew", markup=False)
            return
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        choose_deepspeed_device(accelerator.device.type)
        part = stage_recipes(recipe)[0][1]
        data = read_data(part, facts, tokenizer, accelerator)
        rows = data.eval if len(data.eval) else data.train
        rows = rows.part(0, min(_ROWS, len(rows)))
        dense = load_dense(recipe, facts)
        losses = [_loss(dense, recipe, rows, accelerator)]
        dense.to("cpu")
        console.print("pruning the model ...", markup=False)
        began = time.monotonic()
        written = write_pruned(recipe, facts, tokenizer, data, accelerator.device, folder, model=dense)
        seconds = time.monotonic() - began
        del dense  # what is left of it: it was cut
        smaller = trained_recipe(recipe, run_dir.path).model
        plain = smaller.model_copy(update={"load_in_4bit": False, "attn_implementation": None})
        dense = load_dense(recipe, facts).to(accelerator.device)
        pruned = load_model(read_facts(plain), plain, device=accelerator.device, dtype=dense.dtype)
        losses.append(_loss(pruned, recipe, rows, accelerator))
    table = _table([dense, pruned], losses, probe_tokens(rows))
    console.print(table, markup=False)
    console.print(f"{written.line}; it took {duration_text(seconds)}", markup=False)
    console.print(f"a {written.kind} model.  Next: shoestring train {source}", markup=False)


def _loss(model: Any, recipe: Recipe, rows: TokenRows, accelerator: Accelerator) -> float | None:
    """Held-out cross entropy a trained token; None of pairs, whose loss needs a reference."""
    if takes_pairs(stage_recipes(recipe)[0][1]):
        return None
    model.to(accelerator.device)
    some = next(model.parameters())  # an engine has an optimizer, if only of one tensor
    engine = NativeEngine(
        accelerator,
        LossModule(model, build_objective(SftObjective(), model)),
        torch.optim.SGD([some], lr=0.0),
        autocast=False,
    )
    return evaluate(
        engine, accelerator, rows, compared=len(rows), micro_tokens=2048, micro_rows=None, packed=False
    ).loss


@torch.no_grad()
def _seconds(models: Sequence[Any], ids: Tensor) -> list[float]:
    """Of each model: the median of some forward passes over `ids` [1, L], taken in turns."""
    ids = ids.to(models[0].device)
    times: list[list[float]] = [[] for _ in models]
    for _ in range(_TURNS + 1):
        for model, taken in zip(models, times, strict=True):
            began = time.perf_counter()
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            float(logits.flatten()[0])  # waits for the device
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken[1:]) for taken in times]  # the first one warms up


def _table(models: Sequence[Any], losses: Sequence[float | None], probe: Tensor) -> Table:
    rows: list[tuple[str, Sequence[float], Callable[[float], str]]] = [
        ("parameters", [sum(p.numel() for p in model.parameters()) for model in models], count_text),
        ("weights", [sum(p.nbytes for p in model.parameters()) for model in models], bytes_text),
        (f"forward pass, {probe.shape[1]} tokens", _seconds(models, probe), _milliseconds),
        ("forward pass, one token", _seconds(models, probe[:, :1]), _milliseconds),
    ]
    table = Table("", "before", "after", "", box=box.SIMPLE_HEAD)
    for name, (before, after), text in rows:
        table.add_row(name, text(before), text(after), f"{after / before - 1:+.1%}")
    dense, pruned = losses
    if dense is not None and pruned is not None:
        table.add_row("held-out loss, untrained", f"{dense:.4f}", f"{pruned:.4f}", f"{pruned - dense:+.4f}")
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
