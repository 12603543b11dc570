"""The optimizer with its state where the plan wants it."""

from __future__ import annotations

import torch

from ..offload import OffloadedOptimizer, offload_optimizer
from ..plan import Plan, scratch_folder
from ..recipes import Recipe


def place_state(
    optimizer: torch.optim.Optimizer, recipe: Recipe, plan: Plan
) -> tuple[torch.optim.Optimizer, list[str]]:
    """The optimizer itself, or with its state on the plan's tier; and lines that say how."""
    tier, keys = plan.placement.tier("optimizer"), recipe.offload
    if tier == "device":
        return optimizer, []
    return offload_optimizer(
        optimizer,
        tier=tier,
        folder=scratch_folder(recipe),
        buffer_size=int(keys.buffer_size),
        buffer_count=keys.buffer_count,
        io=keys.io,
        io_threads=keys.io_threads,
        pin_memory=keys.pin_memory,
        numa_policy=keys.numa_policy,
        update=keys.update,
    )


def release_state(optimizer: torch.optim.Optimizer) -> None:
    """Free the buffers and the scratch file; the state is lost."""
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.close()
