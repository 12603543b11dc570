"""AdamW's rule on tensors (arXiv:1711.05101, algorithm 2), without rate, decay and weights."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_update(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float, step: int
) -> Tensor:
    """The direction m̂ / (√v̂ + ε), of grad's shape; both moments are changed in place."""
    direction = advance(grad, exp_avg, exp_avg_sq, betas, eps, (1 - betas[1] ** step) ** -0.5)
    return direction.mul_(1 / (1 - betas[0] ** step))


def advance(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float], eps: float, root: float
) -> Tensor:
    """m / (√v · root + ε), of grad's shape; both moments are changed in place."""
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt().mul_(root).add_(eps)
    return torch.div(exp_avg, denominator, out=denominator)
