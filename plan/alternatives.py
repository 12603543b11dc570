"""When nothing fits: the changes of the recipe that would, each really planned, and the refusal."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from ..offload.support import supports
from ..recipes import ApolloMini, DeepSpeedConfig, DistillObjective, LoraAdapter, Recipe
from ..recipes.adapter_checks import adapter_problems
from ..recipes.engine_checks import engine_problems
from ..recipes.errors import BudgetError
from ..recipes.optimizers import AdamW8bit
from . import defaults
from .fit import Candidate
from .grounds import Grounds
from .offload import saves_on_disk
from .refusal import Change, does_not_fit, shortage_of
from .search import pick, smallest

Values = dict[str, Any]
"""By section: a new one, or some of its keys with their values."""

# Rows shorter than this are not proposed: a change that cuts most of the data is no cheap one.
_SHORTEST = 256


def refuse(grounds: Grounds) -> BudgetError:
    """The error for a recipe that fits in no way: its smallest form by part, and what to change."""
    least = smallest(grounds)
    limits = grounds.around.limits
    shortage = shortage_of(
        least.footprint,
        host=limits.host,
        device=limits.device,
        host_source=limits.host_source,
        device_source=limits.device_source,
    )
    changes: list[Change] = []
    texts: dict[str, str] = {}  # by key: of two optimizers the later one counts
    together: Change | None = None
    everything = grounds.recipe
    for text, values in _proposals(grounds):
        changed = _changed(grounds.recipe, values)
        if engine_problems(changed) or adapter_problems(changed):
            continue
        changes.append(_planned(text, changed, grounds, least))
        joined = _changed(everything, values)
        both = {**texts, text.partition("=")[0]: text}
        if len(both) > 1 and (together is None or not together.fits):
            together = _planned(" ".join(both.values()), joined, grounds, least)
        if "offload.optimizer=disk" not in text:  # those after it may change the optimizer, whose state it is
            everything, texts = joined, both
    return does_not_fit(shortage, changes, together)


def _planned(text: str, recipe: Recipe, grounds: Grounds, before: Candidate) -> Change:
    changed = Grounds(recipe, grounds.around)
    chosen = pick(changed)
    candidate = chosen or smallest(changed)
    needed = candidate.footprint.device_total or candidate.footprint.host_total
    slower = _seconds(changed, candidate) / _seconds(grounds, before) - 1
    return Change(text, needed, slower, chosen is not None, same="offload.optimizer=disk" in text)


def _seconds(grounds: Grounds, candidate: Candidate) -> float:
    """Seconds of a token with its share of the optimizer's step, for a batch that the plan might choose."""
    update, train = grounds.update_seconds(candidate.tier), grounds.recipe.train
    batch = float(train.batch_tokens or 0)
    if not batch and grounds.micro_rows is not None:
        batch = grounds.micro_rows * (train.gradient_accumulation_steps or 1) * grounds.data.mean_length
    if not batch:
        least = update * (1 / defaults.MAX_OPTIMIZER_SHARE - 1) / candidate.seconds_per_token
        batch = min(max(defaults.batch_tokens_for(grounds.data.tokens), least), defaults.MAX_BATCH_TOKENS)
    return candidate.seconds_per_token + update / batch


def _proposals(grounds: Grounds) -> Iterator[tuple[str, Values]]:
    """Changes in the order of preference: first those that train the same thing, last those that do not."""
    recipe = grounds.recipe
    train = recipe.train
    if (train.per_device_train_batch_size or 1) > 1:
        yield "train.per_device_train_batch_size=1", {"train": {"per_device_train_batch_size": 1}}
    if train.batch_tokens is not None and train.gradient_accumulation_steps is not None:
        yield "train.gradient_accumulation_steps=auto", {"train": {"gradient_accumulation_steps": None}}
    if train.activation_checkpointing is False and train.wta_crs_ratio is None:
        yield "train.activation_checkpointing=true", {"train": {"activation_checkpointing": True}}
    yield from _shards(grounds)
    yield from _moves(grounds)
    quantised = importlib.util.find_spec("bitsandbytes") is not None
    if recipe.optimizer.name == "adamw" and quantised:
        optimizer = AdamW8bit(
            learning_rate=recipe.optimizer.learning_rate,
            weight_decay=recipe.optimizer.weight_decay,
            max_grad_norm=recipe.optimizer.max_grad_norm,
        )
        if recipe.offload.optimizer in ("host", "disk"):
            kept = {"offload": {"optimizer": None}}
            yield "optimizer=adamw_8bit offload.optimizer=auto", {"optimizer": optimizer, **kept}
        else:
            yield "optimizer=adamw_8bit", {"optimizer": optimizer}
    if recipe.optimizer.name == "adamw" and recipe.adapter is None:
        # A rate given for AdamW suits it too: optimizers/rates.py.
        mini = ApolloMini(
            learning_rate=recipe.optimizer.learning_rate,
            weight_decay=recipe.optimizer.weight_decay,
            max_grad_norm=recipe.optimizer.max_grad_norm,
        )
        yield "optimizer=apollo_mini", {"optimizer": mini}
    objective = recipe.objective
    if isinstance(objective, DistillObjective) and objective.teacher_logits == "online" and objective.top_k:
        yield "objective.teacher_logits=stored", {"objective": {"teacher_logits": "stored"}}
    if recipe.adapter is None:
        yield "adapter=lora", {"adapter": LoraAdapter()}
    elif not recipe.model.load_in_4bit and quantised:
        yield "model.load_in_4bit=true", {"model": {"load_in_4bit": True}}
    half = grounds.layout.max_length // 2
    if half >= _SHORTEST:
        yield f"data.max_length={half}", {"data": {"max_length": half}}


def _shards(grounds: Grounds) -> Iterator[tuple[str, Values]]:
    """More of DeepSpeed's state in shards, and its optimizer in host memory where that is another one."""
    engine = grounds.recipe.engine
    if not isinstance(engine, DeepSpeedConfig):
        return
    if engine.zero_stage < 3 and grounds.around.world_size > 1:
        yield "engine.zero_stage=3", {"engine": {"zero_stage": 3}}
    if engine.offload_optimizer == "none" and engine.zero_stage > 0 and grounds.device.type != "cpu":
        yield "engine.offload_optimizer=cpu", {"engine": {"offload_optimizer": "cpu"}}


def _moves(grounds: Grounds) -> Iterator[tuple[str, Values]]:
    """The optimizer's state on disk, where the plan may not put it there by itself, or all of it."""
    recipe, to_disk = grounds.recipe, {"offload": {"optimizer": "disk"}}
    if recipe.offload.optimizer in ("device", "host") and _saves(grounds):
        yield "offload.optimizer=disk", to_disk
    own = getattr(recipe.optimizer, "weights", None)
    if recipe.adapter is None and own is not None and grounds.precision.dtype == torch.float32:
        # The float32 weights themselves go to the disk; what stays in memory are bfloat16 ones.
        values = {"model": {"dtype": "bfloat16"}, "optimizer": {"weights": "master"}, **to_disk}
        if _saves(Grounds(_changed(recipe, values), grounds.around)):
            yield "model.dtype=bfloat16 optimizer.weights=master offload.optimizer=disk", values


def _saves(grounds: Grounds) -> bool:
    """Whether the optimizer's state needs less memory when it is on disk."""
    return supports(grounds.recipe.optimizer) is None and saves_on_disk(grounds.sizes_on("disk"))


def _changed(recipe: Recipe, values: Values) -> Recipe:
    """The recipe with sections replaced, or with some of their keys where a dict is given."""
    return recipe.model_copy(
        update={
            section: getattr(recipe, section).model_copy(update=value) if isinstance(value, dict) else value
            for section, value in values.items()
        }
    )
