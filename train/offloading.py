"""Optimizer state and activations where the plan wants them."""

from __future__ import annotations

import torch
from torch import nn

from ..offload import OffloadedOptimizer, offload_optimizer
from ..offload.activation_model import ActivationChoice, recompute_first, spread
from ..offload.activations import apply_activations
from ..offload.arena import Arena
from ..offload.pool import HostPool
from ..offload.segments import PAGE
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
        snapshots=plan.snapshot_bytes > 0,
    )


def place_activations(
    model: nn.Module, recipe: Recipe, plan: Plan, layers: int, device: torch.device
) -> list[str]:
    """Recompute and swap as many layers as the plan says, and say so.

    Streamed layers are computed again as it is.
    """
    if recipe.offload.weights != "device":
        return []
    again, swapped = min(plan.recomputed_layers, layers), min(plan.swapped_layers, layers)
    if swapped:
        size = next(placed.bytes for placed in plan.placement.parts if placed.part == "swapped")
        pinned = Arena(size + PAGE, pin=device.type == "cuda", numa_policy=recipe.offload.numa_policy)
        choice = ActivationChoice(spread(layers, swapped, again))
        handle = apply_activations(model, choice, pool=HostPool(size, arena=pinned))
        return [handle.line, *pinned.lines]
    if again:
        apply_activations(model, recompute_first(again, layers))
    return []


def release_state(optimizer: torch.optim.Optimizer) -> None:
    """Free the buffers and the scratch file; the state is lost."""
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.close()
