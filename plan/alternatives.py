"""When nothing fits: the changes of the recipe that would, each really planned, and the refusal."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from ..recipes import ApolloMini, DistillObjective, LoraAdapter, Recipe
from ..recipes.errors import BudgetError
from ..recipes.optimizers import AdamW8bit
from .fit import Candidate
from .grounds import Grounds
from .refusal import Change, does_not_fit, shortage_of

# Rows shorter than this are not proposed: a change that cuts most of the data is no cheap one.
_SHORTEST = 256


def refuse(grounds: Grounds) -> BudgetError:
    """The error for a recipe that fits in no way: its smallest form by part, and what to change."""
    least = grounds.smallest()
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
    for text, section, values in _proposals(grounds):
        changes.append(_planned(text, _changed(grounds.recipe, section, values), grounds, least))
        everything = _changed(everything, section, values)
        texts[text.partition("=")[0]] = text
        if len(texts) > 1 and (together is None or not together.fits):
            together = _planned(" ".join(texts.values()), everything, grounds, least)
    return does_not_fit(shortage, changes, together)


def _planned(text: str, recipe: Recipe, grounds: Grounds, before: Candidate) -> Change:
    changed = Grounds(recipe, grounds.around)
    chosen = changed.pick()
    candidate = chosen or changed.smallest()
    needed = candidate.footprint.device_total or candidate.footprint.host_total
    slower = candidate.seconds_per_token / before.seconds_per_token - 1
    return Change(text, needed, slower, chosen is not None)


def _proposals(grounds: Grounds) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Changes in the order of preference: first those that train the same thing, last those that do not."""
    recipe = grounds.recipe
    train = recipe.train
    if (train.per_device_train_batch_size or 1) > 1:
        yield (
            "train.per_device_train_batch_size=1",
            "train",
            {"per_device_train_batch_size": 1},
        )
    if train.batch_tokens is not None and train.gradient_accumulation_steps is not None:
        yield (
            "train.gradient_accumulation_steps=auto",
            "train",
            {"gradient_accumulation_steps": None},
        )
    if train.activation_checkpointing is False and train.wta_crs_ratio is None:
        yield "train.activation_checkpointing=true", "train", {"activation_checkpointing": True}
    quantised = importlib.util.find_spec("bitsandbytes") is not None
    if recipe.optimizer.name == "adamw" and quantised:
        optimizer = AdamW8bit(
            learning_rate=recipe.optimizer.learning_rate,
            weight_decay=recipe.optimizer.weight_decay,
            max_grad_norm=recipe.optimizer.max_grad_norm,
        )
        yield "optimizer=adamw_8bit", None, {"optimizer": optimizer}
    if recipe.optimizer.name == "adamw" and recipe.adapter is None:
        # A rate given for AdamW suits it too: optimizers/rates.py.
        mini = ApolloMini(
            learning_rate=recipe.optimizer.learning_rate,
            weight_decay=recipe.optimizer.weight_decay,
            max_grad_norm=recipe.optimizer.max_grad_norm,
        )
        yield "optimizer=apollo_mini", None, {"optimizer": mini}
    objective = recipe.objective
    if isinstance(objective, DistillObjective) and objective.teacher_logits == "online" and objective.top_k:
        yield "objective.teacher_logits=stored", "objective", {"teacher_logits": "stored"}
    if recipe.adapter is None:
        yield "adapter=lora", None, {"adapter": LoraAdapter()}
    elif not recipe.model.load_in_4bit and quantised:
        yield "model.load_in_4bit=true", "model", {"load_in_4bit": True}
    half = grounds.layout.max_length // 2
    if half >= _SHORTEST:
        yield f"data.max_length={half}", "data", {"max_length": half}


def _changed(recipe: Recipe, section: str | None, values: dict[str, Any]) -> Recipe:
    if section is None:
        return recipe.model_copy(update=values)
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
