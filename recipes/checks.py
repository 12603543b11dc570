"""Checks between keys: each problem names the keys that disagree and what to type instead."""

from typing import TYPE_CHECKING

from .adapter_checks import adapter_problems
from .engine_checks import engine_problems
from .objective_checks import objective_problems
from .objectives import DpoObjective
from .problem import Problem
from .pruning_checks import pruning_problems

if TYPE_CHECKING:
    from .schema import Recipe


def problems(recipe: "Recipe") -> list[Problem]:
    """All disagreements between keys of a recipe whose values are valid one by one."""
    return [
        *_budget(recipe),
        *objective_problems(recipe),
        *_batch(recipe),
        *_sampling(recipe),
        *_optimizer(recipe),
        *adapter_problems(recipe),
        *pruning_problems(recipe),
        *_data(recipe),
        *_export(recipe),
        *engine_problems(recipe),
    ]


def _budget(recipe: "Recipe") -> list[Problem]:
    budget = recipe.budget
    found = []
    limits = (budget.time, budget.cost, budget.energy, budget.tokens, budget.steps, budget.epochs)
    if all(limit is None for limit in limits):
        found.append(
            Problem(
                "budget",
                "budget has no limit; give at least one of time, cost, energy, tokens, steps, epochs.   "
                "For example budget.time=2h",
            )
        )
    if budget.cost is not None and budget.price is None:
        found.append(
            Problem(
                "budget.cost",
                f"budget.cost={budget.cost.text} needs budget.price, what the machine costs an hour.   "
                f'For example budget.price="2.49 {budget.cost.currency}/h"',
            )
        )
    elif (
        budget.cost is not None and budget.price is not None and budget.cost.currency != budget.price.currency
    ):
        found.append(
            Problem(
                "budget.cost",
                f"budget.cost={budget.cost.text} and budget.price={budget.price.text} are in different "
                "currencies.   Give both in one",
                ("budget.price",),
            )
        )
    return found


def _batch(recipe: "Recipe") -> list[Problem]:
    train = recipe.train
    found = []
    if train.batch_tokens is not None and train.per_device_train_batch_size is not None:
        found.append(
            Problem(
                "train.batch_tokens",
                f"train.batch_tokens={train.batch_tokens} and "
                f"train.per_device_train_batch_size={train.per_device_train_batch_size} exclude each "
                "other.   Keep one; the other is train.batch_tokens=auto or "
                "train.per_device_train_batch_size=auto",
                ("train.per_device_train_batch_size",),
            )
        )
    if recipe.schedule.warmup_steps >= 1 and recipe.schedule.warmup_steps != int(
        recipe.schedule.warmup_steps
    ):
        found.append(
            Problem(
                "schedule.warmup_steps",
                f"schedule.warmup_steps is {recipe.schedule.warmup_steps}; allowed: a share of the budget "
                "below 1, or a whole number of steps",
            )
        )
    return found


def _sampling(recipe: "Recipe") -> list[Problem]:
    train, adapter = recipe.train, recipe.adapter
    if train.wta_crs_ratio is None:
        return []
    found = []
    if adapter is not None:
        found.append(
            Problem(
                "train.wta_crs_ratio",
                f"train.wta_crs_ratio={train.wta_crs_ratio} samples the weight gradients of whole linear "
                f"layers, and adapter={adapter.name} has none.   Set adapter=null, or "
                "train.wta_crs_ratio=null",
                ("adapter",),
            )
        )
    if train.activation_checkpointing:
        found.append(
            Problem(
                "train.wta_crs_ratio",
                f"train.wta_crs_ratio={train.wta_crs_ratio} and train.activation_checkpointing=true exclude "
                "each other: what is computed again need not be sampled.   Keep one; the other is "
                "train.wta_crs_ratio=null or train.activation_checkpointing=auto",
                ("train.activation_checkpointing",),
            )
        )
    return found


def _optimizer(recipe: "Recipe") -> list[Problem]:
    name, schedule, dtype = recipe.optimizer.name, recipe.schedule.name, recipe.model.dtype
    found = []
    if name == "schedule_free_adamw" and schedule != "constant":
        found.append(
            Problem(
                "optimizer.name",
                f"optimizer.name={name} averages the weights in place of a falling rate, and "
                f"schedule={schedule} lowers it.   Set schedule=constant, or optimizer.name=adamw",
                ("schedule.name",),
            )
        )
    if name in ("adam_mini", "schedule_free_adamw") and recipe.adapter is None and dtype == "bfloat16":
        found.append(
            Problem(
                "model.dtype",
                f"model.dtype={dtype} and adapter=null train {dtype} weights, and optimizer.name={name} "
                f"would keep a second moment in {dtype}, where it cannot shrink.   Set model.dtype=auto, "
                "or optimizer.name=adamw",
                ("optimizer.name",),
            )
        )
    if name == "q_apollo" and recipe.adapter is not None:
        found.append(
            Problem(
                "optimizer.name",
                f"optimizer.name={name} holds the trained weights in int8, and adapter={recipe.adapter.name} "
                "trains small matrices that gain nothing by it.   Set adapter=null, or optimizer.name=apollo",
                ("adapter",),
            )
        )
    clipping, max_grad_norm = getattr(recipe.optimizer, "clipping", None), recipe.optimizer.max_grad_norm
    if clipping == "exact" and max_grad_norm is None:
        found.append(
            Problem(
                "optimizer.clipping",
                f"optimizer.clipping={clipping} keeps to optimizer.max_grad_norm, and "
                "optimizer.max_grad_norm=null clips nothing.   Set optimizer.max_grad_norm=1.0, or leave "
                "optimizer.clipping out",
                ("optimizer.max_grad_norm",),
            )
        )
    return found


def _data(recipe: "Recipe") -> list[Problem]:
    data = recipe.data
    held_out = data.eval if isinstance(data.eval, list) else []
    columns = {
        "data.columns": data.columns,
        **{f"data.train.{n}.columns": source.columns for n, source in enumerate(data.train)},
        **{f"data.eval.{n}.columns": source.columns for n, source in enumerate(held_out)},
        **{f"data.preferences.{n}.columns": s.columns for n, s in enumerate(data.preferences or [])},
    }
    pairs = isinstance(recipe.objective, DpoObjective) or data.format == "preference"
    found = []
    for key, names in columns.items():
        if names is None:
            continue
        given = [name for name, column in names if column]
        others = set(given) - {"system"}
        if pairs or key.startswith("data.preferences"):
            if not others <= {"prompt", "chosen", "rejected"} or not given:
                found.append(
                    Problem(
                        key,
                        f"{key} names {', '.join(given) or 'nothing'}; allowed for pairs: prompt, chosen, "
                        "rejected, system.   For example {prompt: question, chosen: good, rejected: bad}",
                    )
                )
        elif others not in ({"prompt", "completion"}, {"messages"}) and given != ["text"]:
            found.append(
                Problem(
                    key,
                    f"{key} names {', '.join(given) or 'nothing'}; allowed: prompt and completion, or "
                    "messages, or text (system may join the first two).   For example "
                    "{prompt: question, completion: answer}",
                )
            )
    return found


def _export(recipe: "Recipe") -> list[Problem]:
    if recipe.adapter is None and recipe.export.final == "adapter":
        return [
            Problem(
                "export.final",
                "export.final=adapter needs an adapter, and adapter=null trains every weight.   "
                "Set export.final=merged, or adapter=lora",
                ("adapter",),
            )
        ]
    return []
