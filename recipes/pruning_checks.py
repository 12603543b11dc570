"""When a recipe prunes, and checks between the keys of `pruning` and the rest."""

from typing import TYPE_CHECKING

from .problem import Problem
from .pruning import PARTS, PruningConfig

if TYPE_CHECKING:
    from .schema import Recipe

START, END = 0.25, 0.75
"""Of the budget's progress: between these, sparse pretraining lost least (arXiv:2501.12486)."""
CUTTABLE = ("adamw", "schedule_free_adamw")
"""Optimizers whose states have the shapes of their weights."""


def pruning_span(recipe: "Recipe") -> tuple[float, float] | None:
    """Progress of the first and the last cut; None: the model is pruned before training, or not at all."""
    pruning = recipe.pruning
    if pruning is None or pruning.start == 0 or (pruning.start is None and _obstacles(recipe, pruning)):
        return None
    start = START if pruning.start is None else pruning.start
    return start, max(start, END) if pruning.end is None else pruning.end


def pruning_problems(recipe: "Recipe") -> list[Problem]:
    """What the criterion cannot do, and what does not go together."""
    pruning = recipe.pruning
    if pruning is None:
        return []
    found = [*_parts(pruning), *_updates(pruning), *_times(pruning)]
    if pruning.start is not None and pruning.start > 0:
        found += [
            Problem(
                "pruning.start",
                f"pruning.start={pruning.start} prunes while it trains, and {text}.   Set pruning.start=0 to "
                f"prune before training, or {fix}",
                (key,),
            )
            for key, text, fix in _obstacles(recipe, pruning)
        ]
    return found


def _parts(pruning: PruningConfig) -> list[Problem]:
    allowed, given = PARTS[pruning.name], pruning.chosen_parts
    wrong = [part for part in given if part not in allowed]
    if wrong:
        return [
            Problem(
                "pruning.parts",
                f"pruning.parts: {pruning.name} does not judge {', '.join(wrong)}; allowed: "
                f"{', '.join(allowed)}.   Take another pruning.name, or leave pruning.parts out",
                ("pruning.name",),
            )
        ]
    if "blocks" in given and len(given) > 1:
        return [
            Problem(
                "pruning.parts",
                f"pruning.parts=[{', '.join(given)}]: blocks leave alone.   Prune twice for both: first "
                "`shoestring prune` with parts: [blocks], then the folder that it writes",
            )
        ]
    return []


def _updates(pruning: PruningConfig) -> list[Problem]:
    found = []
    if pruning.refit and (pruning.compensate or "neurons" not in pruning.chosen_parts):
        other = "pruning.compensate=true" if pruning.compensate else "pruning.parts without neurons"
        found.append(
            Problem(
                "pruning.refit",
                f"pruning.refit=true fits down_proj to the neurons that stay, and excludes {other}.   "
                "Set pruning.refit=false, or change the other",
                ("pruning.compensate",) if pruning.compensate else (),
            )
        )
    if pruning.compensate and (pruning.chosen_parts == ("blocks",) or pruning.name == "modegpt"):
        found.append(
            Problem(
                "pruning.compensate",
                f"pruning.compensate=true has nothing to compensate with pruning.name={pruning.name}.   "
                "Leave it out",
                ("pruning.name",),
            )
        )
    return found


def _times(pruning: PruningConfig) -> list[Problem]:
    start = pruning.start
    if pruning.end is None or (start is not None and pruning.end >= start):
        return []
    if start is None and pruning.end >= START:
        return []
    return [
        Problem(
            "pruning.end",
            f"pruning.end={pruning.end} is before pruning.start={START if start is None else start}.   "
            "Give an end that is not, or leave it out",
            ("pruning.start",),
        )
    ]


def _obstacles(recipe: "Recipe", pruning: PruningConfig) -> list[tuple[str, str, str]]:
    """(key, why the model cannot be cut while it trains, what to change)."""
    optimizer, offload = recipe.optimizer, recipe.offload
    found = []
    if recipe.adapter is not None:
        found.append(
            ("adapter", f"adapter={recipe.adapter.name} is tied to the shapes of now", "adapter=null")
        )
    if optimizer.name not in CUTTABLE or getattr(optimizer, "state_bits", 32) != 32:
        bits = getattr(optimizer, "state_bits", 32)
        what = f"optimizer.name={optimizer.name}" + ("" if bits == 32 else f" with state_bits={bits}")
        found.append(
            (
                "optimizer.name",
                f"{what} has states that cannot be cut with their weights",
                "optimizer.name=adamw with 32 bits",
            )
        )
    if getattr(optimizer, "step_in_backward", False):
        found.append(
            (
                "optimizer.step_in_backward",
                "optimizer.step_in_backward=true holds on to every weight",
                "optimizer.step_in_backward=false",
            )
        )
    if recipe.engine.name != "native":
        found.append(
            ("engine.name", f"engine={recipe.engine.name} has cut the weights up itself", "engine=native")
        )
    if offload.optimizer in ("host", "disk") or offload.weights != "device":
        key = "offload.weights" if offload.weights != "device" else "offload.optimizer"
        found.append((key, f"{key}={getattr(offload, key[8:])} has fixed places", f"{key}=device"))
    if recipe.objective.name in ("dpo", "sft_then_dpo"):
        found.append(
            (
                "objective.name",
                f"objective={recipe.objective.name} compares with a reference of the shapes of before",
                "objective=sft",
            )
        )
    if recipe.train.wta_crs_ratio is not None:
        found.append(
            ("train.wta_crs_ratio", "train.wta_crs_ratio replaces the layers", "train.wta_crs_ratio=null")
        )
    if "groups" in pruning.chosen_parts:
        found.append(
            (
                "pruning.parts",
                "groups of heads may need another class of model, which is chosen at the start",
                "pruning.parts=[neurons]",
            )
        )
    for key, given in (
        ("pruning.compensate", pruning.compensate),
        ("pruning.ratio_of", pruning.ratio_of == "latency"),
    ):
        if given:
            fix = f"{key}={'false' if key.endswith('compensate') else 'parameters'}"
            found.append((key, f"{key} is for a model that is pruned once", fix))
    return found
