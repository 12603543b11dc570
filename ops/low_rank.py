"""A step that knows a gradient by a low-rank sketch of it: two reads of the gradient, one of the weights.

APOLLO, GaLore and FRUGAL (`optimizers/`) share these parts. For G [m, n] and its larger side l, smaller k:

    pass 1   R = G P [l, r], and c_j = |g_j|² of each channel j of the larger side
    between  moments of R; a factor s_j a channel, or the step N in the subspace
    pass 2   W ← keep W + s_j G, or keep W + N Pᵀ, rounded as it is written

Pass 1 is `first_pass`; APOLLO goes on with `apollo_factors` and `add_scaled`, GaLore with `subspace_step` and
`add_product`. The limiter of growth (arXiv:2410.01623) needs |s ∘ G|² = Σ s_j² c_j and the global norm Σ c_j,
so neither is a pass more; R is linear in G, so what clipping multiplies by, `grad_scale`, enters between the
passes. Nothing of the size of G is made there: neither the scaled gradient nor N Pᵀ. FRUGAL by columns
(arXiv:2411.07837) is one pass, `add_columns`. Bytes an element of bfloat16: 2 + 6, and 6 for the one pass
(and the moments).

Matrices come stacked, [B, m, n], gradients and weights of any strides. noise = (key, start) of
`rounding.noise_key` and `rounding.noise_start` rounds bfloat16 weights at random, None to nearest; weights of
other types are always rounded to nearest. The kernels take gradients and weights of 32 and 16 bits, and tell
autograd what they wrote; float64 runs on PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .adamw import adamw_update
from .low_rank_torch import add_rows, channel_factors, channel_squares, moved_step, product, sign_of, sketch
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


class FirstPass(NamedTuple):
    """What pass 1 of matrices [B, m, n] found, in the computing type.

    parts: R in parts [P, B, l, r] whose sum it is. squares: |g_j|² of each channel [P, B, l] likewise, or
    empty where they were not asked for.
    """

    parts: Tensor
    squares: Tensor

    def projected(self) -> Tensor:
        """R [B, l, r]."""
        return _summed(self.parts)

    def summed(self) -> FirstPass:
        """The same in one part."""
        if len(self.parts) == 1:
            return self
        return FirstPass(self.parts.sum(0, keepdim=True), self.squares.sum(0, keepdim=True))


def first_pass(grad: Tensor, projection: Tensor, *, squares: bool = True) -> FirstPass:
    """R = G P and the squared norms of G's channels, of grad [B, m, n] and projection [B or 1, k, r].

    The product is made in the type of `projection`. PyTorch rounds R to it; the kernel sums in float32.
    """
    if torch.compiler.is_compiling():
        projected, found = first_pass_op(grad, projection, squares)
        return FirstPass(projected.unsqueeze(0), found.unsqueeze(0) if squares else found)
    if provider(grad, projection) == "triton":
        from .kernels.low_rank import project as launch

        return FirstPass(*launch(upright(grad), projection, squares=squares))
    projected = sketch(upright(grad), projection).to(_computing(grad)).unsqueeze(0)
    return FirstPass(projected, channel_squares(grad).unsqueeze(0) if squares else projected.new_empty(0))


def project(grad: Tensor, projection: Tensor) -> Tensor:
    """R [B, l, r] of `first_pass`."""
    return first_pass(grad, projection, squares=False).projected()


def apollo_factors(
    found: FirstPass, exp_avg: Tensor, exp_avg_sq: Tensor, norm: Tensor, *, betas: tuple[float, float],
    eps: float, per_channel: bool, limit: float | None, before: float, first: bool, rate: float,
    grad_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What to multiply the channels of G by: [B, l, 1], or [B, 1, 1] for one factor a matrix.

        s = |N_j| / (|R_j| + 1e-8),  N = M / (√V + ε);  c s rate · limit / max(u / u_before, limit),
        u = before c |s ∘ G|

    R is c times that of `found` (arXiv:2412.05270), c = grad_scale, a scalar on the device. exp_avg and
    exp_avg_sq [B, l, r] and norm [B, 1, 1] are changed in place; first: there is no u_before yet. limit None:
    any growth, norm is left alone.
    """
    options = (*betas, eps, per_channel, limit, before, first, rate, grad_scale)
    if torch.compiler.is_compiling():
        factors: Tensor = apollo_factors_op(
            found.projected(), _summed(found.squares), exp_avg, exp_avg_sq, norm, *options
        )
        return factors
    if provider(found.parts, exp_avg) == "triton":
        from .kernels import low_rank_write

        scaled, raw = low_rank_write.moments(found.parts, exp_avg, exp_avg_sq, betas, eps, grad_scale)
        made = low_rank_write.factors(
            scaled, raw, found.squares, norm, per_channel=per_channel, limit=limit, before=before,
            first=first, rate=rate, grad_scale=grad_scale,
        )  # fmt: skip
        increment_version((exp_avg, exp_avg_sq, norm))
        return made.unsqueeze(2)
    return channel_factors(found.projected(), _summed(found.squares), exp_avg, exp_avg_sq, norm, *options)


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
        launch(projected.contiguous().unsqueeze(0), exp_avg, exp_avg_sq, betas, eps, None, found, factor)
        increment_version((exp_avg, exp_avg_sq))
        return found
    return moved_step(projected, exp_avg, exp_avg_sq, betas=betas, eps=eps).mul_(factor).to(dtype)


def add_scaled(weight: Tensor, grad: Tensor, factors: Tensor, *, keep: float, noise: Noise | None) -> None:
    """weight ← keep weight + factors grad, each [B, m, n]; factors as of `apollo_factors`, float32."""
    if torch.compiler.is_compiling():
        add_scaled_op(weight, grad, factors, keep, noise)
    elif provider(weight, grad, factors) == "triton":
        from .kernels.low_rank_write import add_scaled as launch

        launch(weight, grad, factors, keep, _noise_of(weight, noise))
        increment_version(weight)
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

        launch(weight, left, right, keep, _noise_of(weight, noise))
        increment_version(weight)
    else:
        _write(weight, lambda target, rows: target.add_(product(left[:, rows], right.mT)), keep, noise)


def add_columns(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, first: int, *, keep: float,
    rate: float, free: float, rule: Rule, betas: tuple[float, float], eps: float, step: int,
    noise: Noise | None, grad_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """weight ← keep weight - rate Adam(active columns of c grad) - free rule(the others), each [B, m, n].

    c is grad_scale, a scalar on the device, or 1. Active are the count columns from `first` on, round the
    end; exp_avg and exp_avg_sq [B, m, count] are in the order of the columns and are changed in place. step
    counts from 1 since they were zero.
    """
    options = (first, keep, rate, free, rule, *betas, eps, step, noise, grad_scale)
    if torch.compiler.is_compiling():
        add_columns_op(weight, grad, exp_avg, exp_avg_sq, *options)
    elif provider(weight, grad, exp_avg) == "triton":
        from .kernels.low_rank_write import columns as launch

        launch(
            weight, grad, exp_avg, exp_avg_sq, first, keep=keep, rate=-rate, free=-free,
            rule=_RULES[rule], betas=betas, eps=eps, step=step, noise=_noise_of(weight, noise),
            grad_scale=grad_scale,
        )  # fmt: skip
        increment_version((weight, exp_avg, exp_avg_sq))
    else:
        spans, count, cols = [slice(first, first + exp_avg.shape[2])], exp_avg.shape[2], grad.shape[2]
        if first + count > cols:
            spans = [slice(0, first + count - cols), slice(first, cols)]
        active = torch.cat([grad[:, :, span] for span in spans], dim=2).to(_computing(grad))
        if grad_scale is not None:
            active *= grad_scale
        moved = adamw_update(active, exp_avg, exp_avg_sq, betas=betas, eps=eps, step=step).mul_(-rate)
        pieces = torch.split(moved, [span.stop - span.start for span in spans], dim=2)

        def add(target: Tensor, rows: slice) -> None:
            rest = grad[:, rows].to(target.dtype, copy=True)
            rest = sign_of(rest) if rule == "sign_sgd" else rest if rule == "sgd" else rest.zero_()
            rest.mul_(-free)
            if rule == "sgd" and grad_scale is not None:
                rest.mul_(grad_scale)
            for span, piece in zip(spans, pieces, strict=True):
                rest[:, :, span] = piece[:, rows]
            target.add_(rest)

        _write(weight, add, keep, noise)


def _summed(parts: Tensor) -> Tensor:
    return parts.sum(0) if len(parts) > 1 else parts[0] if len(parts) else parts


def _noise_of(weight: Tensor, noise: Noise | None) -> Noise | None:
    """What the kernels get: they round to bfloat16 whatever the weights are."""
    return noise if weight.dtype == torch.bfloat16 else None


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


@torch.library.custom_op("shoestring::low_rank_first_pass", mutates_args=())
def first_pass_op(grad: Tensor, projection: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    """`first_pass`, summed: R [B, l, r], squares [B, l] or empty."""
    found = first_pass(grad, projection, squares=squares)
    # what is returned must not be a view of what else is returned or given
    return found.projected().clone(), _summed(found.squares).clone()


@first_pass_op.register_fake
def _(grad: Tensor, projection: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    matrices, long = grad.shape[0], max(grad.shape[1:])
    projected = grad.new_empty((matrices, long, projection.shape[2]), dtype=_computing(grad))
    return projected, projected.new_empty((matrices, long) if squares else 0)


@torch.library.custom_op("shoestring::apollo_factors", mutates_args=("exp_avg", "exp_avg_sq", "norm"))
def apollo_factors_op(
    projected: Tensor, squares: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, norm: Tensor, beta1: float,
    beta2: float, eps: float, per_channel: bool, limit: float | None, before: float, first: bool, rate: float,
    grad_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """`apollo_factors` of what `first_pass_op` gives."""
    found = FirstPass(projected.unsqueeze(0), squares.unsqueeze(0))
    return apollo_factors(
        found, exp_avg, exp_avg_sq, norm, betas=(beta1, beta2), eps=eps, per_channel=per_channel,
        limit=limit, before=before, first=first, rate=rate, grad_scale=grad_scale,
    )  # fmt: skip


@apollo_factors_op.register_fake
def _(projected: Tensor, squares: Tensor, exp_avg: Tensor, *rest: object) -> Tensor:
    matrices, long, _ = projected.shape
    return exp_avg.new_empty((matrices, long if rest[5] else 1, 1))


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
    grad_scale: Tensor | None,
) -> None:  # fmt: skip
    """`add_columns`."""
    add_columns(
        weight, grad, exp_avg, exp_avg_sq, first, keep=keep, rate=rate, free=free,
        rule=rule, betas=(beta1, beta2), eps=eps, step=step, noise=_pair(noise),  # type: ignore[arg-type]
        grad_scale=grad_scale,
    )  # fmt: skip


def _pair(noise: list[int] | None) -> Noise | None:
    return None if noise is None else (noise[0], noise[1])
