"""A step that knows a gradient by a low-rank sketch of it: two reads of the gradient, one of the weights.

APOLLO, GaLore and FRUGAL (`optimizers/`) share these parts. For G [m, n] and its larger side l, smaller k:

    pass 1   R = G P [l, r], and c_j = |g_j|² of each channel j of the larger side
    between  moments of R; a factor s_j a channel, or the step N in the subspace
    pass 2   W ← keep W + s_j G, or keep W + N Pᵀ, rounded as it is written

APOLLO's are `apollo_factors` and `add_scaled`, GaLore's `project`, `subspace_step` and `add_product`. The
limiter of growth (arXiv:2410.01623) needs |s ∘ G|² = Σ s_j² c_j, so it is no third pass. Nothing of the
size of G is made between: neither the scaled gradient nor N Pᵀ. FRUGAL by columns (arXiv:2411.07837) is one
pass, `add_columns`. Bytes an element of bfloat16: 2 + 6, and 6 for the one pass (and the moments).

Matrices come stacked, [B, m, n], gradients and weights of any strides. noise = (key, start) of
`rounding.noise_key` and `rounding.noise_start` rounds bfloat16 weights at random, None to nearest. The
kernels take gradients and weights of 32 and 16 bits; float64 runs on PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .adamw import adamw_update
from .low_rank_torch import add_rows, channel_factors, moved_step, product, sketch
from .providers import Provider, choose
from .rounding import Noise
from .writing import add_step

Rule = Literal["sign_sgd", "sgd", "none"]
_RULES: dict[str, int] = {"none": 0, "sign_sgd": 1, "sgd": 2}
_KINDS = (torch.float32, torch.bfloat16, torch.float16)


def provider(*tensors: Tensor) -> Provider:
    """What runs for these gradients and weights; UserError as from `choose`."""
    offered: list[Provider] = ["triton"] if all(t.dtype in _KINDS for t in tensors) else []
    return choose("low_rank", tensors[0].device, offered)


def upright(matrix: Tensor) -> Tensor:
    """[..., m, n] with the larger side first: itself or its transposed view."""
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT


def project(grad: Tensor, projection: Tensor) -> Tensor:
    """R [B, l, r] in the computing type, of grad [B, m, n] and projection [B or 1, k, r].

    The product is made in the type of `projection`. PyTorch rounds R to it; the kernel sums in float32.
    """
    if torch.compiler.is_compiling():
        found: Tensor = project_op(grad, projection)
        return found
    if provider(grad, projection) == "triton":
        from .kernels.low_rank import project as launch

        parts = launch(upright(grad), projection, squares=False)[0]
        return parts[0] if len(parts) == 1 else parts.sum(0)
    return sketch(upright(grad), projection).to(_computing(grad))


def apollo_factors(
    grad: Tensor, projection: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, norm: Tensor, *,
    betas: tuple[float, float], eps: float, per_channel: bool, limit: float | None, before: float,
    first: bool, rate: float,
) -> Tensor:  # fmt: skip
    """What to multiply grad [B, m, n] by: [B, m, 1] or [B, 1, n], or [B, 1, 1] for one factor a matrix.

        s = |N_j| / (|R_j| + 1e-8),  N = M / (√V + ε);  s rate · limit / max(u / u_before, limit),
        u = before |s ∘ G|

    of R = G projection [B or 1, k, r] (arXiv:2412.05270). exp_avg and exp_avg_sq [B, l, r] and norm [B, 1, 1]
    are changed in place; first: there is no u_before yet. limit None: any growth, norm is left alone.
    """
    options = (*betas, eps, per_channel, limit, before, first, rate)
    if torch.compiler.is_compiling():
        found: Tensor = apollo_factors_op(grad, projection, exp_avg, exp_avg_sq, norm, *options)
        return found
    if provider(grad, projection) == "triton":
        from .kernels import low_rank, low_rank_write

        parts, squares = low_rank.project(upright(grad), projection, squares=True)
        scaled, raw = low_rank_write.moments(parts, exp_avg, exp_avg_sq, betas, eps)
        found = low_rank_write.factors(
            scaled,
            raw,
            squares,
            norm,
            per_channel=per_channel,
            limit=limit,
            before=before,
            first=first,
            rate=rate,
        )
        return found.unsqueeze(1 if grad.shape[1] < grad.shape[2] else 2)
    return channel_factors(grad, projection, exp_avg, exp_avg_sq, norm, *options)


def subspace_step(
    projected: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float,
    factor: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """factor · M / (√V + ε) in `dtype`, of projected [B, l, r]; both moments are changed in place."""
    if torch.compiler.is_compiling():
        found: Tensor = subspace_step_op(projected, exp_avg, exp_avg_sq, *betas, eps, factor, dtype)
        return found
    if provider(projected, exp_avg) == "triton":
        from .kernels.low_rank_write import moments as launch

        found = torch.empty_like(projected, dtype=dtype, memory_format=torch.contiguous_format)
        launch(projected.contiguous().unsqueeze(0), exp_avg, exp_avg_sq, betas, eps, found, factor)
        return found
    return moved_step(projected, exp_avg, exp_avg_sq, betas=betas, eps=eps).mul_(factor).to(dtype)


def add_scaled(weight: Tensor, grad: Tensor, factors: Tensor, *, keep: float, noise: Noise | None) -> None:
    """weight ← keep weight + factors grad, each [B, m, n]; factors as of `apollo_factors`, float32."""
    if torch.compiler.is_compiling():
        add_scaled_op(weight, grad, factors, keep, noise)
    elif provider(weight, grad, factors) == "triton":
        from .kernels.low_rank_write import add_scaled as launch

        launch(weight, grad, factors, keep, noise)
    else:

        def add(target: Tensor, rows: slice) -> None:
            add_rows(target, grad[:, rows], factors[:, rows] if factors.shape[1] > 1 else factors)

        _write(weight, add, keep, noise)


def add_product(weight: Tensor, left: Tensor, right: Tensor, *, keep: float, noise: Noise | None) -> None:
    """weight [B, m, n] ← keep weight + left rightᵀ, of left [B, m, r] and right [B, n, r] of one type."""
    if torch.compiler.is_compiling():
        add_product_op(weight, left, right, keep, noise)
    elif provider(weight, left, right) == "triton":
        from .kernels.low_rank import add_product as launch

        launch(weight, left, right, keep, noise)
    else:
        _write(weight, lambda target, rows: target.add_(product(left[:, rows], right.mT)), keep, noise)


def add_columns(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, first: int, *, keep: float,
    rate: float, free: float, rule: Rule, betas: tuple[float, float], eps: float, step: int,
    noise: Noise | None,
) -> None:  # fmt: skip
    """weight ← keep weight - rate Adam(active columns of grad) - free rule(the others), each [B, m, n].

    Active are the count columns from `first` on, round the end; exp_avg and exp_avg_sq [B, m, count] are in
    the order of the columns and are changed in place. step counts from 1 since they were zero.
    """
    options = (first, keep, rate, free, rule, *betas, eps, step, noise)
    if torch.compiler.is_compiling():
        add_columns_op(weight, grad, exp_avg, exp_avg_sq, *options)
    elif provider(weight, grad, exp_avg) == "triton":
        from .kernels.low_rank_write import columns as launch

        launch(
            weight, grad, exp_avg, exp_avg_sq, first, keep=keep, rate=-rate, free=-free,
            rule=_RULES[rule], betas=betas, eps=eps, step=step, noise=noise,
        )  # fmt: skip
    else:
        spans, count, cols = [slice(first, first + exp_avg.shape[2])], exp_avg.shape[2], grad.shape[2]
        if first + count > cols:
            spans = [slice(0, first + count - cols), slice(first, cols)]
        active = torch.cat([grad[:, :, span] for span in spans], dim=2).to(_computing(grad))
        moved = adamw_update(active, exp_avg, exp_avg_sq, betas=betas, eps=eps, step=step).mul_(-rate)
        pieces = torch.split(moved, [span.stop - span.start for span in spans], dim=2)

        def add(target: Tensor, rows: slice) -> None:
            rest = grad[:, rows].to(target.dtype, copy=True)
            rest = rest.sign_() if rule == "sign_sgd" else rest if rule == "sgd" else rest.zero_()
            rest.mul_(-free)
            for span, piece in zip(spans, pieces, strict=True):
                rest[:, :, span] = piece[:, rows]
            target.add_(rest)

        _write(weight, add, keep, noise)


def _computing(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _write(weight: Tensor, add: Callable[[Tensor, slice], object], keep: float, noise: Noise | None) -> None:
    if weight.numel() == 0:
        return

    def step(target: Tensor, rows: slice) -> None:
        add(target, rows)

    mode: Literal["sr", "plain"] = "plain" if noise is None else "sr"
    add_step([weight], [{}], step, keep=keep, mode=mode, noise=[noise or (0, 0)])


# As operations that torch.compile keeps whole.


@torch.library.custom_op("shoestring::low_rank_project", mutates_args=())
def project_op(grad: Tensor, projection: Tensor) -> Tensor:
    """`project`."""
    return project(grad, projection)


@project_op.register_fake
def _(grad: Tensor, projection: Tensor) -> Tensor:
    shape = (grad.shape[0], max(grad.shape[1:]), projection.shape[2])
    return grad.new_empty(shape, dtype=_computing(grad))


@torch.library.custom_op("shoestring::apollo_factors", mutates_args=("exp_avg", "exp_avg_sq", "norm"))
def apollo_factors_op(
    grad: Tensor, projection: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, norm: Tensor, beta1: float,
    beta2: float, eps: float, per_channel: bool, limit: float | None, before: float, first: bool, rate: float,
) -> Tensor:  # fmt: skip
    """`apollo_factors`."""
    return apollo_factors(
        grad, projection, exp_avg, exp_avg_sq, norm, betas=(beta1, beta2), eps=eps, per_channel=per_channel,
        limit=limit, before=before, first=first, rate=rate,
    )  # fmt: skip


@apollo_factors_op.register_fake
def _(grad: Tensor, projection: Tensor, exp_avg: Tensor, *rest: object) -> Tensor:
    matrices, rows, cols = grad.shape
    shape = (matrices, 1, cols) if rows < cols else (matrices, rows, 1)
    return exp_avg.new_empty(shape if rest[5] else (matrices, 1, 1))


@torch.library.custom_op("shoestring::subspace_step", mutates_args=("exp_avg", "exp_avg_sq"))
def subspace_step_op(
    projected: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float, eps: float,
    factor: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`subspace_step`."""
    betas = (beta1, beta2)
    return subspace_step(projected, exp_avg, exp_avg_sq, betas=betas, eps=eps, factor=factor, dtype=dtype)


@subspace_step_op.register_fake
def _(
    projected: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float, eps: float,
    factor: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return projected.new_empty(projected.shape, dtype=dtype)


@torch.library.custom_op("shoestring::add_scaled", mutates_args=("weight",))
def add_scaled_op(
    weight: Tensor, grad: Tensor, factors: Tensor, keep: float, noise: list[int] | None
) -> None:
    """`add_scaled`."""
    add_scaled(weight, grad, factors, keep=keep, noise=_pair(noise))


@torch.library.custom_op("shoestring::add_product", mutates_args=("weight",))
def add_product_op(weight: Tensor, left: Tensor, right: Tensor, keep: float, noise: list[int] | None) -> None:
    """`add_product`."""
    add_product(weight, left, right, keep=keep, noise=_pair(noise))


@torch.library.custom_op("shoestring::add_columns", mutates_args=("weight", "exp_avg", "exp_avg_sq"))
def add_columns_op(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, first: int, keep: float, rate: float,
    free: float, rule: str, beta1: float, beta2: float, eps: float, step: int, noise: list[int] | None,
) -> None:  # fmt: skip
    """`add_columns`."""
    add_columns(
        weight, grad, exp_avg, exp_avg_sq, first, keep=keep, rate=rate, free=free,
        rule=rule, betas=(beta1, beta2), eps=eps, step=step, noise=_pair(noise),  # type: ignore[arg-type]
    )  # fmt: skip


def _pair(noise: list[int] | None) -> Noise | None:
    return None if noise is None else (noise[0], noise[1])
