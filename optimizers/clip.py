"""The gradient's global norm, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops.grad_pack import global_norm


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; None only measures.

    Returns the norm before clipping: a scalar on the gradients' device, float32 (float64 for float64
    gradients) also where gradients are bfloat16, whose own norm would have three digits. Not finite when a
    gradient is not. Parameters without a gradient count for nothing.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float32)
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.device, grad.dtype), []).append(grad)
    places: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        places.setdefault(grad.device, []).append(grad)
    norms = [global_norm(same).to(grads[0].device) for same in places.values()]
    precise = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms)).to(precise)
    if max_norm is None or (norm.device.type == "cpu" and bool(norm <= max_norm)):
        return norm
    scale = torch.clamp(max_norm / norm, max=1.0)
    for (device, _), same in kinds.items():
        torch._foreach_mul_(same, scale.to(device))
    return norm


def clip_for_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], max_norm: float | None
) -> Tensor:
    """`clip_by_global_norm`, where the next step of `optimizer` does the scaling if it can (`grad_scale`).

    That spares a pass that reads and writes all gradients; they then stay as they are. Of an optimizer that
    reads gradients twice the first read gives their norm too (`TwoPassOptimizer.first_pass`).
    """
    if not getattr(optimizer, "scales_gradients", False):
        return clip_by_global_norm(parameters, max_norm)
    norm = _norm_for_step(optimizer, list(parameters))
    # None too: the step of a gradient that was not finite may have been skipped, and left its scale here
    scale = None
    if max_norm is not None and (norm.device.type != "cpu" or bool(norm > max_norm)):
        scale = torch.clamp(max_norm / norm, max=1.0)
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    return norm


def _norm_for_step(optimizer: Any, parameters: list[Tensor]) -> Tensor:
    """The global norm, from the optimizer's first pass as far as it makes one."""
    if not hasattr(optimizer, "first_pass"):
        return clip_by_global_norm(parameters, None)
    read, squares = optimizer.first_pass()
    known = set(read)
    if squares is None or not known <= set(parameters):
        optimizer.forget_first_pass()
        return clip_by_global_norm(parameters, None)
    rest = clip_by_global_norm([p for p in parameters if p not in known], None).to(squares)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([squares.sqrt(), rest]))
    return norm
