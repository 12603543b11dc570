"""Whether a run keeps snapshots in host memory, and how much they take."""

from __future__ import annotations

from ..recipes import Recipe
from ..recipes.errors import BudgetError, in_columns
from . import defaults
from .fit import Candidate, Limits
from .memory import Sizes
from .offload_writes import size_text

SLOTS = 2
"""Snapshots held: while one is written the other is whole."""
AWAY = "state is kept elsewhere to spare memory, and snapshots would hold it in memory twice"
SHARE = 0.5
"""Of the memory that the run leaves free, what snapshots may take without being asked for."""


def why_no_snapshots(recipe: Recipe, processes: int) -> str | None:
    """Why this run can have no snapshots in memory; None where it can."""
    if recipe.engine.name != "native":
        return f"engine={recipe.engine.name} holds its state in shards"
    if processes > 1:
        return f"{processes} processes train, and snapshots are of one"
    if "disk" in (recipe.offload.optimizer, recipe.offload.weights):
        return AWAY
    return None


def snapshot_bytes(recipe: Recipe, sizes: Sizes, chosen: Candidate, limits: Limits, processes: int) -> int:
    """Bytes of host memory for snapshots; 0 where there are none.

    Raises BudgetError with the numbers where the recipe asks for them and they do not fit.
    """
    wanted = recipe.checkpoint.in_memory
    if wanted is False or why_no_snapshots(recipe, processes) is not None:
        return 0
    if chosen.tier != "device" or sizes.weights_tier != "device":
        if wanted:
            raise BudgetError(in_columns([("checkpoint.in_memory", f"true was given, but {AWAY}")]))
        return 0
    needed = SLOTS * (sizes.trained + sizes.optimizer + sizes.reference)
    free = int(limits.host * (1.0 - defaults.MEMORY_MARGIN)) - chosen.footprint.host_total
    if needed <= SHARE * free or (wanted and needed <= free):
        return needed
    if wanted:
        what = (
            f"true was given; two snapshots take {size_text(needed)} of host memory, and the run leaves "
            f"{size_text(max(0, free))}.\n"
            "Give it more (budget.host_memory), or leave them out: checkpoint.in_memory=auto"
        )
        raise BudgetError(in_columns([("checkpoint.in_memory", what)]))
    return 0


def snapshots_line(recipe: Recipe, needed: int, processes: int) -> str:
    """What the plan says of them."""
    if needed:
        return f"{size_text(needed)} of host memory for {SLOTS}, held by a process that outlives this one"
    if recipe.checkpoint.in_memory is False:
        return "checkpoint.in_memory=false"
    return why_no_snapshots(recipe, processes) or "they would take more than half of the memory left free"
