"""Whether a run keeps snapshots in host memory, and how much they take.

State on disk stays there: a snapshot says where (offload/shadow.py), for twice the room on the disk.
"""

from __future__ import annotations

from ..recipes import DeepSpeedConfig, Recipe
from ..recipes.errors import BudgetError, in_columns
from . import defaults
from .fit import Candidate, Limits
from .memory import Sizes
from .offload_writes import missing_for_second_places, size_text

SLOTS = 2
"""Snapshots held: while one is written the other is whole."""
AWAY = "state is kept in host memory to spare the device's, and snapshots would hold it there twice more"
STREAMED = "weights are streamed, and a step changes them where they lie"
SEVERAL = "state is on disk, where only one process alone can name it in a snapshot"
SHARE = 0.5
"""Of the memory that the run leaves free, what snapshots may take without being asked for."""


def in_shards(recipe: Recipe, processes: int) -> bool:
    """Whether each process takes a part of the snapshot."""
    return processes > 1 or recipe.engine.name != "native"


def why_no_snapshots(recipe: Recipe, processes: int) -> str | None:
    """Why this run can have no snapshots in memory; None where it can."""
    engine = recipe.engine
    if isinstance(engine, DeepSpeedConfig):
        if engine.zenflow is not None:
            return "ZenFlow's updates go on while a snapshot would be copied"
        if "nvme" in (engine.offload_optimizer, engine.offload_param):
            return "DeepSpeed keeps the state on disk, and changes it there"
    if recipe.offload.weights == "disk":
        return STREAMED
    if recipe.offload.optimizer == "disk" and processes > 1:
        return SEVERAL
    return None


def snapshot_bytes(recipe: Recipe, sizes: Sizes, chosen: Candidate, limits: Limits, processes: int) -> int:
    """Bytes of host memory for snapshots; 0 where there are none.

    Raises BudgetError with the numbers where the recipe asks for them and they do not fit.
    """
    wanted = recipe.checkpoint.in_memory
    if wanted is False or why_no_snapshots(recipe, processes) is not None:
        return 0
    several = chosen.tier == "disk" and processes > 1
    if chosen.tier == "host" or sizes.weights_tier != "device" or several:
        if wanted:
            away = SEVERAL if several else AWAY if chosen.tier == "host" else STREAMED
            raise BudgetError(in_columns([("checkpoint.in_memory", f"true was given, but {away}")]))
        return 0
    needed = SLOTS * _each(sizes, processes)
    free = int(limits.host * (1.0 - defaults.MEMORY_MARGIN)) - chosen.footprint.host_total
    if needed <= SHARE * free or (wanted and needed <= free):
        missing = missing_for_second_places(recipe, sizes)
        if not missing:
            return needed
        if wanted:
            what = (
                "true was given; of state on disk they need a second place there, for which "
                f"{size_text(missing)} are missing.\n"
                "Free space, choose another disk (offload.disk_path), or leave them out: "
                "checkpoint.in_memory=auto"
            )
            raise BudgetError(in_columns([("checkpoint.in_memory", what)]))
        return 0
    if wanted:
        what = (
            f"true was given; two snapshots take {size_text(needed)} of host memory, and the run leaves "
            f"{size_text(max(0, free))}.\n"
            "Give it more (budget.host_memory), or leave them out: checkpoint.in_memory=auto"
        )
        raise BudgetError(in_columns([("checkpoint.in_memory", what)]))
    return 0


def _each(sizes: Sizes, processes: int) -> int:
    """Bytes of one snapshot in one process: its share of the whole, and parity of the others' shares."""
    state = sizes.state if sizes.held is None else sizes.held.saved * processes
    share = -(-(sizes.trained + state + sizes.reference) // processes)
    return share if processes == 1 else share + -(-share // (processes - 1))


def snapshots_line(recipe: Recipe, needed: int, processes: int) -> str:
    """What the plan says of them."""
    if needed:
        return f"{size_text(needed)} of host memory for {SLOTS}, held by a process that outlives this one"
    if recipe.checkpoint.in_memory is False:
        return "checkpoint.in_memory=false"
    short = "they would take more than half of the memory left free, or the disk has no room for state twice"
    return why_no_snapshots(recipe, processes) or short
