"""The gradient's global norm, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; None only measures.

    Returns the norm before clipping: a scalar on the gradients' device, float32 (float64 for float64
    gradients) also where gradients are bfloat16, whose own norm would have three digits. Not finite when a
    gradient is not. Parameters without a gradient count for nothing.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.device, grad.dtype), []).append(grad)
    norms: list[Tensor] = []
    for (_, dtype), same in kinds.items():
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        norms.extend(torch._foreach_norm(same, 2.0, dtype=precise))
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(grads[0].device) for n in norms]))
    if max_norm is None or (norm.device.type == "cpu" and bool(norm <= max_norm)):
        return norm
    scale = torch.clamp(max_norm / norm, max=1.0)
    for (device, _), same in kinds.items():
        torch._foreach_mul_(same, scale.to(device))
    return norm
