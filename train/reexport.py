"""`shoestring export`: a checkpoint of a run as a merged model or an adapter, loaded to check it, or GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from ..adapters import merge_in_place
from ..checkpoint import Checkpoint, newest, open_checkpoint
from ..data import prepare
from ..models import check_quantization, load_tokenizer, read_facts, save_gguf
from ..models.weight_files import read_object
from ..plan import Plan
from ..pruning import load_pruned
from ..recipes import SftObjective
from ..recipes.errors import UserError
from .assembly import build_engine, takes_pairs
from .export import export_final
from .inspect import run_recipe
from .landing import probe_tokens
from .pruned import trained_recipe
from .quiet import quiet_libraries
from .restore import as_saved
from .rundir import kept


def export_run(
    run: Path, *, to: str, checkpoint: str, output: Path | None, quantize: str | None = None
) -> None:
    """Rebuild the model of `run`, restore a checkpoint's weights, export to `output` (default RUN/export-TO).

    For `to` gguf, `run` may be the folder of a model too, and the default is RUN/export-QUANTIZE.gguf.
    Raises UserError for a folder that is no run, an unknown target or type, a checkpoint that is not there.
    """
    kind = _check_target(to, quantize)
    quiet_libraries()
    if to == "gguf" and (run / "config.json").is_file():
        found, own = _load_folder(run)
        target = output or run / f"export-{kind}.gguf"
        _write_gguf(
            found, target, Console(highlight=False), quantize=kind, tokenizer=own, name=run.resolve().name
        )
        return
    trained = trained_recipe(run_recipe(run), run)
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
    if to == "gguf":
        model: Any = engine.loss_module.model
        plain = merge_in_place(model) if hasattr(model, "peft_config") else model
        target = output or run / f"export-{kind}.gguf"
        _write_gguf(plain, target, console, quantize=kind, tokenizer=tokenizer, name=run.resolve().name)
        return
    exported = export_final(
        engine.loss_module,
        tokenizer,
        output or run / f"export-{to}",
        merged=to == "merged",
        probe=probe_tokens(data.eval if len(data.eval) else data.train),
        card=f"# {run.name}\n\n{chosen.path.name} of a shoestring run on {facts.source}, exported as {to}.\n",
        autocast=plan.autocast,
    )
    console.print(exported.line, markup=False)


def _check_target(to: str, quantize: str | None) -> str:
    """The type of the weights in a GGUF file."""
    if to not in ("merged", "adapter", "gguf"):
        raise UserError(f"--to {to} is not an export.  Allowed: merged, adapter, gguf")
    if to != "gguf" and quantize is not None:
        raise UserError(f"--quantize {quantize} is for --to gguf; --to {to} keeps the weights' own type.")
    check_quantization(quantize or "f16")
    return quantize or "f16"


def _load_folder(folder: Path) -> tuple[Any, Any]:
    """The folder itself, whose weights are read one by one; or the loaded model and tokenizer of a pruned one
    whose layers differ in width.
    """
    if not str(read_object(folder / "config.json").get("model_type")).startswith("pruned_"):
        return folder, None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder} has no tokenizer that can be loaded: {str(error).splitlines()[0]}\n"
            "  Copy tokenizer.json and tokenizer_config.json of its base model beside the weights."
        ) from error
    return load_pruned(folder), tokenizer


def _write_gguf(model: Any, target: Path, console: Console, **given: Any) -> None:
    written = save_gguf(model, target, **given)
    console.print(f"{written.line}, {written.bytes / 1e6:,.1f} MB", markup=False)
    for note in written.notes:
        console.print(f"  {note}", markup=False)


def _choose(run: Path, name: str, console: Console) -> Checkpoint:
    if name != "last":
        return open_checkpoint(run / name)
    found = newest(run, lambda line: console.print(line, markup=False))
    if found is None:
        raise UserError(f"{run} has no checkpoint yet.")
    return found
