"""Checks between the objective and the keys that it needs or excludes."""

from typing import TYPE_CHECKING

from .objectives import DistillObjective, SftThenDpoObjective
from .problem import Problem

if TYPE_CHECKING:
    from .schema import Recipe


def objective_problems(recipe: "Recipe") -> list[Problem]:
    """All disagreements of the objective, the pairs, and the state kept before a decay."""
    objective, data, budget = recipe.objective, recipe.data, recipe.budget
    found = []
    if isinstance(objective, SftThenDpoObjective):
        if objective.reference == "adapter_off":
            found.append(
                Problem(
                    "objective.reference",
                    "objective.reference=adapter_off is the model before sft, and dpo must start from the "
                    "model after it.   Set objective.reference=frozen, or leave it out",
                )
            )
        if data.preferences is None:
            found.append(
                Problem(
                    "objective.name",
                    "objective=sft_then_dpo needs data.preferences, rows with prompt, chosen and rejected.   "
                    "For example data.preferences=pairs.jsonl, or objective=sft",
                )
            )
        if budget.epochs is not None:
            found.append(
                Problem(
                    "budget.epochs",
                    f"budget.epochs={budget.epochs:g} counts passes over one set of rows, and "
                    "objective=sft_then_dpo has two.   Give budget.tokens, budget.steps or budget.time",
                    ("objective.name",),
                )
            )
    elif data.preferences is not None:
        found.append(
            Problem(
                "data.preferences",
                f"data.preferences is for objective=sft_then_dpo, and objective is {objective.name}.   "
                "Set objective=sft_then_dpo; or train on pairs alone: objective=dpo with data.train",
                ("objective.name",),
            )
        )
    if (
        isinstance(objective, DistillObjective)
        and objective.teacher_logits == "stored"
        and objective.top_k is None
    ):
        found.append(
            Problem(
                "objective.teacher_logits",
                "objective.teacher_logits=stored keeps the likeliest tokens, and objective.top_k=null keeps "
                "none.   Set objective.top_k=64, or objective.teacher_logits=online",
            )
        )
    if recipe.checkpoint.keep_pre_decay and recipe.schedule.name != "wsd":
        found.append(
            Problem(
                "checkpoint.keep_pre_decay",
                f"checkpoint.keep_pre_decay=true is for schedule=wsd, and schedule={recipe.schedule.name} "
                "has no such point.   Set schedule=wsd, or checkpoint.keep_pre_decay=false",
                ("schedule.name",),
            )
        )
    return found
