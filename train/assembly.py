"""What follows from a recipe: rows, plan, model with its engine, and the lines that say so on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from ..adapters import adapter_lines, attach, looks_at_rows
from ..data import Prepared, TokenRows, collate, prepare
from ..models import ModelFacts, load_model, use_packed_attention, weight_reader
from ..ops import use_fused, use_int8_weights, use_wta_crs
from ..ops.providers import lines as provider_lines
from ..optimizers import build_optimizer, share_line, slots, takes_matrices
from ..optimizers.in_backward import BackwardStepper
from ..plan import Plan, data_facts, make_plan, probe
from ..recipes import DistillObjective, DpoObjective, LoraAdapter, OwnObjective, QApollo, Recipe
from ..recipes.errors import UserError
from ..schedules import Clock, Limits
from . import engines
from .engine import NativeEngine
from .objectives import LossModule, build_objective
from .offloading import place_activations, place_state
from .parts import Saved
from .pruning_rounds import cut_again
from .rundir import RunDir, kept
from .screen import Screen
from .sharded import optimizer_of
from .streaming import open_streamed, use_fused_streamed
from .teacher import OnlineTeacher, StoredTeacher, open_teacher


def read_data(
    recipe: Recipe, facts: ModelFacts, tokenizer: Any, accelerator: Accelerator, max_length: int | None = None
) -> Prepared:
    """The rows; the main process prepares them first, the others find them in the cache."""
    section = recipe.data
    if max_length is not None:
        section = section.model_copy(update={"max_length": max_length})
    with accelerator.main_process_first():
        return prepare(
            section,
            tokenizer,
            seed=recipe.train.seed,
            max_length=facts.max_positions,
            preferences=takes_pairs(recipe),
        )


def takes_pairs(recipe: Recipe) -> bool:
    """Whether `data.train` holds pairs of answers."""
    own_pairs = isinstance(recipe.objective, OwnObjective) and recipe.data.format == "preference"
    return own_pairs or isinstance(recipe.objective, DpoObjective)


def fingerprint(rows: TokenRows) -> str:
    """Identity of the training rows: tokens, which are trained, where each row and each answer ends."""
    digest = xxhash.xxh3_128()
    for array in (rows.tokens, rows.trained, rows.offsets):
        digest.update(array.data)
    if rows.second is not None:
        digest.update(np.ascontiguousarray(rows.second).data)
    return digest.hexdigest()


def decide(
    recipe: Recipe,
    facts: ModelFacts,
    data: Prepared,
    accelerator: Accelerator,
    run_dir: RunDir,
    saved: Path | None,
    started: float,
    screen: Screen,
    *,
    share: float = 1.0,
) -> Plan:
    """Made by the main process and sent to the others; a resumed run keeps the plan that it began with, or
    with another number of processes the steps of that plan.

    saved: that plan's file. share: of the budget, for one stage of several.
    """
    holder: list[Any] = [None]
    if accelerator.is_main_process:
        begun = None if saved is None else _begun_with(saved)
        if begun is not None and begun.world_size == accelerator.num_processes:
            plan = begun
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
                share=share,
            )
            if begun is not None:
                plan = plan.with_steps_of(begun)
        holder = [plan.to_json()]
    if accelerator.num_processes > 1:
        broadcast_object_list(holder)
    return Plan.from_json(holder[0])


def _begun_with(path: Path) -> Plan:
    """The plan in a run's plan.json. UserError when it is none."""
    with kept(path) as text:
        return Plan.from_json(text)


def teacher_of(
    recipe: Recipe,
    objective: DistillObjective,
    plan: Plan,
    facts: ModelFacts,
    data: Prepared,
    accelerator: Accelerator,
    screen: Screen,
) -> OnlineTeacher | StoredTeacher:
    """The teacher of a distillation, before the student is loaded: a stored one is in memory only here.

    The main process asks it first, the others find its answers.
    """
    stored = objective.teacher_logits == "stored"
    screen.status("asking the teacher" if stored else "loading the teacher")
    with accelerator.main_process_first():
        return open_teacher(
            objective,
            facts,
            recipe.model,
            [data.train, data.eval],
            device=accelerator.device,
            dtype=getattr(torch, plan.dtype),
            packed=plan.packed,
            micro_tokens=plan.micro_tokens,
        )


def build_engine(
    recipe: Recipe,
    plan: Plan,
    facts: ModelFacts,
    data: Prepared,
    accelerator: Accelerator,
    checkpoint: Saved | None,
    *,
    teacher: OnlineTeacher | StoredTeacher | None = None,
) -> tuple[NativeEngine, list[str]]:
    """The model with its adapter, its loss and its optimizer; and a line for each thing done to it.

    teacher: of distillation, see `teacher_of`.
    """
    in_backward = bool(getattr(recipe.optimizer, "step_in_backward", False))
    if in_backward and accelerator.num_processes > 1:
        raise UserError(
            "optimizer.step_in_backward=true needs one process, and this run has "
            f"{accelerator.num_processes}, whose gradients are averaged only after the backward pass\n"
            "  Set optimizer.step_in_backward=false, or start one process"
        )
    set_seed(recipe.train.seed)
    device = accelerator.device
    streamed = open_streamed(recipe, plan, facts, device, accelerator.num_processes)
    if streamed is not None:
        model: Any = streamed.model
    else:
        model = load_model(facts, recipe.model, device=device, dtype=getattr(torch, plan.dtype))
    cut_again(model, checkpoint)
    if plan.packed:
        use_packed_attention(model)
    adapter = recipe.adapter
    lora = adapter if isinstance(adapter, LoraAdapter) else None
    loftq = lora is not None and lora.init_lora_weights == "loftq"
    trained = attach(
        model,
        adapter,
        facts,
        seed=recipe.train.seed,
        batches=_first_rows(data, device) if looks_at_rows(adapter) else None,
        original_weight=weight_reader(facts) if loftq and recipe.model.load_in_4bit else None,
        saved=checkpoint.json("adapter_config") if checkpoint is not None and adapter is not None else None,
        checkpointing="non_reentrant" if plan.activation_checkpointing else "none",
    )
    fused = [] if streamed is None else [*streamed.lines]
    fused += adapter_lines(trained, adapter)
    if recipe.train.fused_ops:
        fused += use_fused(trained) if streamed is None else use_fused_streamed(streamed, trained)
    fused += provider_lines(device)
    if recipe.train.wta_crs_ratio is not None:
        fused += use_wta_crs(trained, recipe.train.wta_crs_ratio)
    trained.to(device)
    layers = int(model.config.get_text_config().num_hidden_layers)
    fused += place_activations(trained, recipe, plan, layers, device)
    objective = build_objective(recipe.objective, trained, adapter=adapter, teacher=teacher)
    if isinstance(recipe.optimizer, QApollo):
        fused += use_int8_weights(trained, recipe.optimizer.group_size)
    optimizer = build_optimizer(
        trained,
        optimizer_of(recipe).model_copy(update={"weight_decay": plan.weight_decay}),
        loraplus_lr_ratio=lora.loraplus_lr_ratio if lora else None,
        seed=recipe.train.seed,
    )
    if takes_matrices(recipe.optimizer):
        fused.append(f"{recipe.optimizer.name}: {share_line(slots(trained))}")
    optimizer, placed = place_state(optimizer, recipe, plan)
    fused += placed
    if "engine" in plan.reasons:
        fused.append(f"engine {recipe.engine.name}: {plan.reasons['engine']}")
    module = LossModule(trained, objective)
    engine = engines.build(recipe, accelerator, module, optimizer, autocast=plan.autocast)
    engine.streamed = streamed
    if in_backward:
        own = recipe.optimizer
        engine.stepper = BackwardStepper(optimizer, own.max_grad_norm, getattr(own, "clipping", "previous"))
    return engine, fused


def _first_rows(data: Prepared, device: torch.device) -> list[dict[str, Any]]:
    """Rows for a look at the activations before training; padded, since PEFT reads an attention mask."""
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
