"""The small step between the passes (`low_rank.py`) in PyTorch's operations, and the products of matrices.

On a CPU a few rows at a time go through all that is done to them, and stay in its cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CPU_ELEMENTS = 1 << 20
_THIN = 8


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [B, ...] @ right [B or 1, ...]; one pair as a plain product, twice as fast on a CPU."""
    return left @ right if len(left) != 1 else (left[0] @ right[0]).unsqueeze(0)


def sketch(tall: Tensor, projection: Tensor) -> Tensor:
    """R [B, l, r] = tall [B, l, k] projection [B or 1, k, r], in the type of `projection`."""
    tall, projection = tall.to(projection.dtype), projection.expand(len(tall), -1, -1)
    if 1 < projection.shape[2] <= _THIN and tall.device.type == "cpu":
        # With few columns on the right a product of float32 on a CPU takes up to five times as long.
        return product(projection.mT, tall.mT).mT.contiguous()
    return product(tall, projection)


def moved_step(
    projected: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float
) -> Tensor:
    """N = M / (√V + ε), of the projected gradient's shape; both moments are changed in place."""
    exp_avg.lerp_(projected, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(projected, projected, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt().add_(eps)
    return torch.div(exp_avg, denominator, out=denominator)


def apollo_norms(
    sketched: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor]:
    """(norms of N, norms of R) of each channel, [B, l, 1]; both moments [B, l, r] are changed in place."""
    scaled = moved_step(sketched, exp_avg, exp_avg_sq, betas=betas, eps=eps)
    return _norm(scaled, (-1,)), _norm(sketched, (-1,))


def channel_squares(grad: Tensor) -> Tensor:
    """|g_j|² of each channel of the larger side, [B, l], in the computing type."""
    exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if grad.shape[-2] >= grad.shape[-1]:
        return _norm(grad, (-1,), exact).square().squeeze(-1)
    # Norms over columns walk against the grain of memory on a CPU: a few rows at a time stay in cache.
    total = torch.zeros(grad.shape[0], grad.shape[2], dtype=exact, device=grad.device)
    for part in _slices(grad.shape[1], 4 * grad.shape[0] * grad.shape[2], grad.device):
        total += grad[:, part].to(exact).square().sum(dim=-2)
    return total


def channel_factors(
    projected: Tensor, squares: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, norm: Tensor, beta1: float,
    beta2: float, eps: float, per_channel: bool, limit: float | None, before: float, first: bool, rate: float,
    grad_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `low_rank.apollo_factors`, of R [B, l, r] and squares [B, l]."""
    projected = projected.to(exp_avg.dtype)
    if grad_scale is not None:
        projected = projected * grad_scale
    pairs = [
        apollo_norms(projected[:, part], exp_avg[:, part], exp_avg_sq[:, part], betas=(beta1, beta2), eps=eps)
        for part in _slices(projected.shape[1], projected.shape[0] * projected.shape[2], projected.device)
    ]
    scaled, raw = (torch.cat(norms, dim=1) for norms in zip(*pairs, strict=True))
    return factors_of(
        scaled, raw, squares, norm, per_channel=per_channel, limit=limit, before=before, first=first,
        rate=rate, grad_scale=grad_scale,
    )  # fmt: skip


def factors_of(
    scaled: Tensor, raw: Tensor, squares: Tensor, norm: Tensor, *, per_channel: bool, limit: float | None,
    before: float, first: bool, rate: float, grad_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The factors [B, l, 1] or [B, 1, 1] from the norms of N and R of each channel, [B, l, 1].

    N and R are of the scaled gradient, squares [B, l] of the one that the factors are for.
    """
    if not per_channel:
        scaled, raw = _norm(scaled, (-2,)), _norm(raw, (-2,))
    factors = scaled / (raw + 1e-8)
    if grad_scale is not None:
        factors = factors * grad_scale
    if limit is not None:
        now = (squares.unsqueeze(-1) * factors.square()).sum(dim=-2, keepdim=True).sqrt() * before
        if not first:
            shrink = limit / torch.clamp(now / (norm + 1e-8), min=limit)
            factors, now = factors * shrink, now * shrink
        norm.copy_(now)
    return factors.mul(rate)


def add_rows(target: Tensor, grad: Tensor, factors: Tensor) -> None:
    """target ← target + factors grad. Cast before: with two types a CPU goes number by number."""
    target.addcmul_(grad.to(target.dtype), factors)


def sign_of(value: Tensor) -> Tensor:
    """The sign of each element, and NaN for NaN: torch's own is 0, and a step would pass over it unseen."""
    signs = value.sign()
    # On a CPU asking all of them costs a quarter of asking each; elsewhere an answer would be waited for.
    sure = value.device.type == "cpu" and not torch.compiler.is_compiling()
    if sure and bool(torch.isfinite(value.sum())):
        return signs
    return torch.where(value == value, signs, value)


def _slices(length: int, width: int, device: torch.device) -> list[slice]:
    """Parts of `length` rows of `width` elements: what a CPU's cache holds, all at once elsewhere."""
    size = max(1, _CPU_ELEMENTS // max(1, width)) if device.type == "cpu" else max(1, length)
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _norm(value: Tensor, over: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(value, dim=over, keepdim=True, dtype=dtype)
    return result
