"""A run whose model is pruned before training: the smaller model is made once, in a folder of the run
directory, and all that follows trains that folder as it would any other model.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..adapters import compare_logits
from ..data import Prepared
from ..models import ModelFacts, facts_of_skeleton, load_model, read_facts
from ..pruning import Latency, Pruned, everything, read_anatomy, remove, save_pruned
from ..recipes import PruningConfig, Recipe, pruning_span
from ..recipes.errors import ShoestringError, UserError
from .assembly import read_data
from .cutting import amounts_wanted, prune_now
from .export import model_logits, sync_folder
from .figures import count_text
from .landing import probe_tokens
from .rundir import RunDir, kept
from .screen import Screen
from .stages import stage_recipes

FOLDER = "pruned"
_RECORD = "pruning.json"


def prunes_before(recipe: Recipe) -> bool:
    """Whether the model is pruned before training begins."""
    return recipe.pruning is not None and pruning_span(recipe) is None


def trained_recipe(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with the pruned model of the run directory `run` in the model's place, if it has one."""
    if not prunes_before(recipe):
        return recipe
    found = {"model_name_or_path": str(run / FOLDER), "revision": None, "trust_remote_code": False}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=found)})


def prune_first(
    recipe: Recipe,
    facts: ModelFacts,
    tokenizer: Any,
    accelerator: Accelerator,
    run_dir: RunDir,
    screen: Screen,
) -> tuple[Recipe, ModelFacts]:
    """Recipe and facts of the model that is trained: the pruned one, made by the main process if need be.

    Raises UserError where the folder holds a model that was pruned otherwise, or the model cannot be pruned.
    """
    if not prunes_before(recipe):
        return recipe, facts
    folder = run_dir.path / FOLDER
    there = is_there(recipe, facts, folder)
    accelerator.wait_for_everyone()  # all have looked before one writes
    if not there:
        screen.status("pruning the model")
        data = read_data(stage_recipes(recipe)[0][1], facts, tokenizer, accelerator)
        if accelerator.is_main_process:
            written = write_pruned(recipe, facts, tokenizer, data, accelerator.device, folder)
            screen.note(written.line)
        accelerator.wait_for_everyone()
    smaller = trained_recipe(recipe, run_dir.path)
    return smaller, read_facts(smaller.model)


@dataclass(frozen=True)
class Written:
    """A pruned model in its folder. kind: the type of model that it was written as."""

    folder: Path
    kind: str
    pruned: Pruned

    @property
    def line(self) -> str:
        """What was done, for the screen."""
        record = self.pruned.record
        return (
            f"pruned by {record['method']}: {count_text(self.pruned.before)} -> "
            f"{count_text(self.pruned.after)} parameters ({self.pruned.ratio:.1%} less"
            f"{_quicker(self.pruned.latency)}), by {record['calibration_tokens']:,} tokens, in {self.folder}"
        )


def _quicker(latency: Latency | None) -> str:
    if latency is None:
        return ""
    before, after = latency.measured_before, latency.measured_after
    measured = "" if before is None or after is None else f", {1 - after / before:.1%} measured"
    return f", {latency.ratio:.1%} of the time foreseen{measured}"


def write_pruned(
    recipe: Recipe,
    facts: ModelFacts,
    tokenizer: Any,
    data: Prepared,
    device: torch.device,
    folder: Path,
    model: Any = None,
) -> Written:
    """Load the model (or take `model`, which is changed), prune it, write it to `folder` and load it again.

    Written aside and renamed, so `folder` is always whole.

    Raises ShoestringError when the written model does not say what the pruned one said.
    """
    pruning = recipe.pruning
    assert pruning is not None
    if model is None:
        model = load_dense(recipe, facts)
    if pruning.ratio_of == "latency":
        model.to(device)  # where it is timed
    result = prune_now(model, pruning, data, device, facts.max_positions, seed=recipe.train.seed)
    probe = probe_tokens(data.train)
    said = model_logits(model, probe)
    aside = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    record = {**result.record, "recipe": _identity(pruning, facts)}
    kind = save_pruned(model, aside, tokenizer=tokenizer, record=record)
    dtype = model.dtype
    del model
    found = {"model_name_or_path": str(aside), "revision": None, "load_in_4bit": False}
    written = recipe.model.model_copy(update=found)
    again = load_model(read_facts(written), written, device=torch.device("cpu"), dtype=dtype)
    comparison = compare_logits(said, model_logits(again, probe), dtype=dtype)
    if not comparison["within_tolerance"]:
        raise ShoestringError(
            f"the pruned model in {aside} does not say what it said in memory: {comparison}\n"
            "  This is our fault; please report it."
        )
    sync_folder(aside)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)
    return Written(folder, kind, result)


def load_dense(recipe: Recipe, facts: ModelFacts) -> Any:
    """The model as it was published, on the host, in the type that its files have (bfloat16 of a GGUF)."""
    own = facts.config.dtype
    held = (torch.float32, torch.bfloat16, torch.float16)
    dtype = own if facts.kind != "gguf" and own in held else torch.bfloat16
    plain = recipe.model.model_copy(update={"load_in_4bit": False, "attn_implementation": None})
    return load_model(facts, plain, device=torch.device("cpu"), dtype=dtype)


def is_there(recipe: Recipe, facts: ModelFacts, folder: Path) -> bool:
    """Whether the folder holds this recipe's pruned model. UserError where it holds another one."""
    assert recipe.pruning is not None
    if not folder.exists():
        return False
    with kept(folder / _RECORD) as text:
        before = json.loads(text)["recipe"]
    now = _identity(recipe.pruning, facts)
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(
            f"{folder} holds a model that was pruned otherwise: {changed[0]} was "
            f"{before.get(changed[0])}, and is {now[changed[0]]}.\n"
            "  Start anew with --fresh, or set another output_dir"
        )
    return True


def predicted_facts(recipe: Recipe, facts: ModelFacts) -> ModelFacts:
    """Facts of the model that pruning before training will leave; its parameters are exact.

    By `ratio_of: latency` how much leaves is measured, so the plan is that of the unpruned model.

    Raises UserError where this model cannot be pruned so.
    """
    pruning = recipe.pruning
    if pruning is None:
        return facts
    skeleton = replace(facts, config=copy.deepcopy(facts.config)).skeleton()  # its config is changed
    anatomy = read_anatomy(skeleton)
    if pruning.ratio_of == "latency":
        return facts
    amounts = amounts_wanted(anatomy, pruning)
    if not prunes_before(recipe):
        return facts
    whole = everything(anatomy)
    cut = type(whole)(
        tuple(kept[: amounts.neurons] for kept in whole.neurons),
        tuple(kept[: amounts.groups] for kept in whole.groups),
        whole.blocks[: amounts.blocks],
    )
    remove(skeleton, cut)
    return facts_of_skeleton(skeleton, facts)


def _identity(pruning: PruningConfig, facts: ModelFacts) -> dict[str, Any]:
    return {"base": facts.fingerprint, **pruning.model_dump(mode="json")}
