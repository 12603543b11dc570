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


def channel_factors(
    grad: Tensor, projection: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, norm: Tensor, beta1: float,
    beta2: float, eps: float, per_channel: bool, limit: float | None, before: float, first: bool, rate: float,
) -> Tensor:  # fmt: skip
    """As `low_rank.apollo_factors`, whose arguments it takes."""
    m, n = grad.shape[-2:]
    tall = grad if m >= n else grad.mT
    sketched = sketch(tall, projection).to(exp_avg.dtype)
    pairs = [
        apollo_norms(sketched[:, part], exp_avg[:, part], exp_avg_sq[:, part], betas=(beta1, beta2), eps=eps)
        for part in _slices(max(m, n), grad.shape[0] * projection.shape[2], grad.device)
    ]
    scaled, raw = (torch.cat(norms, dim=1) for norms in zip(*pairs, strict=True))
    return factors_of(
        grad, scaled, raw, norm, per_channel=per_channel, limit=limit, before=before, first=first, rate=rate
    )


def factors_of(
    grad: Tensor, scaled: Tensor, raw: Tensor, norm: Tensor, *,
    per_channel: bool, limit: float | None, before: float, first: bool, rate: float,
) -> Tensor:  # fmt: skip
    """The factors from the norms of N and R of each channel, [B, l, 1]; the rest as in `channel_factors`."""
    if not per_channel:
        scaled, raw = _norm(scaled, (-2,)), _norm(raw, (-2,))
    factors = scaled / (raw + 1e-8)
    if grad.shape[-2] < grad.shape[-1]:
        factors = factors.mT
    if limit is not None:
        now = scaled_norm(grad, factors).mul_(before)
        if not first:
            shrink = limit / torch.clamp(now / (norm + 1e-8), min=limit)
            factors, now = factors * shrink, now * shrink
        norm.copy_(now)
    return factors.mul(rate)


def add_rows(target: Tensor, grad: Tensor, factors: Tensor) -> None:
    """target ← target + factors grad. Cast before: with two types a CPU goes number by number."""
    target.addcmul_(grad.to(target.dtype), factors)


def scaled_norm(grad: Tensor, factors: Tensor) -> Tensor:
    """Norm of grad · factors for each matrix, [B, 1, 1], without holding the product."""
    if factors.shape[-1] == 1:
        return _norm(_norm(grad, (-1,), factors.dtype) * factors, (-2, -1))
    if grad.device.type != "cpu":
        columns = _norm(grad, (-2,), factors.dtype)
        return _norm(columns * factors, (-2, -1))
    # Norms over columns walk against the grain of memory on a CPU: a few rows at a time stay in cache.
    rows = _slices(grad.shape[1], grad.shape[0] * grad.shape[2], grad.device)
    parts = [_norm(grad[:, part].to(factors.dtype) * factors, (-2, -1)) for part in rows]
    return _norm(torch.cat(parts, dim=1), (-2, -1))


def _slices(length: int, width: int, device: torch.device) -> list[slice]:
    """Parts of `length` rows of `width` elements: what a CPU's cache holds, all at once elsewhere."""
    size = max(1, _CPU_ELEMENTS // max(1, width)) if device.type == "cpu" else max(1, length)
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _norm(value: Tensor, over: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(value, dim=over, keepdim=True, dtype=dtype)
    return result
