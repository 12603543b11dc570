"""Frozen linear layers with LoRA adapters as one operation (Hu et al., arXiv 2106.09685).

    h = (m x) A^T,   y = x W^T + b + s h B^T          m: the mask of dropout; s: LoRA's scaling / (1 - p)
    dh = s g B,  dx = g W + m (dh A),   dA = dh^T (m x),   dB = s g^T h

PEFT's own forward makes three output-sized temporaries, and with float32 adapters on a bf16 base it runs its
matmuls in float32. Here A and B (float32 masters) are cast once, both products are accumulated into the base
product's own memory by `addmm`, and only x and the skinny h are kept for backward: with dropout neither the
mask nor the dropped x, and of a 4-bit base only its codes. Layers that read the same x (gate and up) form a
group: their A are stacked into one skinny matmul over one dropped x, and dx has one buffer.

Bytes at T tokens, K inputs and N outputs in bf16, beside W's own product: forward 2TK + 4TN, to which dropout
adds 4TK; backward 4TN + 6TK, to which dropout adds 8TK. `kernels/lora.py` says which of them Triton saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import lora_dropout
from .autocast import computing_dtype
from .providers import choose


@dataclass(frozen=True)
class Projection:
    """weight [out, in], bias [out] or None, a [r, in] and b [out, r] or both None, scaling.

    dropout: the share of x that A does not see, 0 where none is at work. state: where weight holds 4-bit
    codes, bitsandbytes' QuantState for them.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float = 1.0
    dropout: float = 0.0
    state: Any = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The four tensors, as an autograd function takes them."""
        return self.weight, self.bias, self.a, self.b

    @property
    def settings(self) -> tuple[float, float, Any]:
        """The rest, in the order of the fields."""
        return self.scaling, self.dropout, self.state

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The base weight in `dtype`; 4-bit codes are dequantised, to be dropped after use."""
        if self.state is None:
            return self.weight.to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.weight, self.state)
        return weight.to(dtype)


def lora_linear(x: Tensor, projection: Projection) -> Tensor:
    """x [..., in] -> [..., out] in x's computing type; gradients reach x, a and b.

    Raises ValueError where weight or bias wants a gradient: the base is frozen.
    """
    check_frozen(projection)
    if torch.compiler.is_compiling():
        from .lora_registered import lora_linear as registered

        return registered(x, projection, drawn_for(projection))
    output: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]  # torch has no types here
        x, *projection.tensors, projection.settings, seed_for(projection)
    )
    return output


def reference(x: Tensor, projection: Projection, seed: int | None = None) -> Tensor:
    """The same by its formula; seed: of the mask, where dropout is at work."""
    output = nn.functional.linear(x, projection.dense(x.dtype), projection.bias)
    if projection.a is None or projection.b is None:
        return output
    seen = x
    if seed is not None:
        ones = torch.ones(x.shape, dtype=x.dtype, device=x.device).view(-1, x.shape[-1])
        mask = lora_dropout.zeroed(ones, projection.dropout, seed).view(x.shape)
        seen = x * mask * lora_dropout.upscale(projection.dropout)
    return output + (seen @ projection.a.t() @ projection.b.t()) * projection.scaling


def check_frozen(*projections: Projection) -> None:
    """Raise ValueError if a weight or a bias wants a gradient that these operations would not give it."""
    if not torch.is_grad_enabled():
        return
    for projection in projections:
        bias = projection.bias
        if projection.weight.requires_grad or (bias is not None and bias.requires_grad):
            raise ValueError("a LoRA operation keeps its base frozen, but the base wants a gradient")


def drawn_for(*group: Projection) -> Tensor | None:
    """A fresh seed where dropout is at work in the group; nothing is drawn otherwise."""
    return lora_dropout.draw_seed() if dropout_of(group) else None


def seed_for(*group: Projection) -> int | None:
    """The same as a number."""
    seed = drawn_for(*group)
    return None if seed is None else int(seed)


def dropout_of(group: Sequence[Projection]) -> float:
    """The share that the adapters of a group drop of their input. Raises ValueError where they differ."""
    shares = {part.dropout for part in group if part.a is not None}
    if len(shares) > 1:
        raise ValueError(f"layers of one group share their dropout, but have {sorted(shares)}")
    return shares.pop() if shares else 0.0


def forward_group(
    flat: Tensor, group: Sequence[Projection], seed: int | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """flat [T, in] -> outputs [T, out] of each projection, and h [T, ranks of all], None without adapters."""
    dtype = flat.dtype
    stacked = _stacked(group, dtype)
    h = None if stacked is None else _down(flat, stacked, dropout_of(group), seed)
    outputs = []
    first = 0
    for part in group:
        bias = None if part.bias is None else part.bias.to(dtype)
        y = nn.functional.linear(flat, part.dense(dtype), bias)
        if h is not None and part.a is not None and part.b is not None:
            rank = part.a.shape[0]
            y.addmm_(h[:, first : first + rank], part.b.to(dtype).t(), alpha=_scale(part, seed))
            first += rank
        outputs.append(y)
    return outputs, h


def backward_group(
    flat: Tensor,
    h: Tensor | None,
    grads: Sequence[Tensor],
    group: Sequence[Projection],
    wants_x: bool,
    seed: int | None = None,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """Gradients of `forward_group`: dx [T, in] (None when not wanted), and (da, db) of each projection."""
    dtype = flat.dtype
    stacked = _stacked(group, dtype)
    pieces: list[Tensor] = []
    high: list[Tensor | None] = []
    first = 0
    for grad, part in zip(grads, group, strict=True):
        if h is None or part.a is None or part.b is None:
            high.append(None)
            continue
        rank = part.a.shape[0]
        dh, db = _up_backward(grad, part.b, h[:, first : first + rank], _scale(part, seed))
        pieces.append(dh)
        high.append(db)
        first += rank
    dx: Tensor | None = None
    if wants_x:
        for grad, part in zip(grads, group, strict=True):
            weight = part.dense(dtype)
            dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
    low: Tensor | None = None
    if pieces and stacked is not None:
        dh = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        low = _down_backward(flat, dh, stacked, dx, dropout_of(group), seed)
    gradients: list[tuple[Tensor | None, Tensor | None]] = []
    first = 0
    for part, db_or_none in zip(group, high, strict=True):
        if low is None or part.a is None:
            gradients.append((None, None))
            continue
        rank = part.a.shape[0]
        gradients.append((low[first : first + rank].to(part.a.dtype), db_or_none))
        first += rank
    return dx, gradients


def _scale(part: Projection, seed: int | None) -> float:
    return part.scaling if seed is None else part.scaling * lora_dropout.upscale(part.dropout)


def _down(flat: Tensor, stacked: Tensor, dropout: float, seed: int | None) -> Tensor:
    """h [T, r] of flat [T, in] and A [r, in]."""
    if seed is None:
        return flat @ stacked.t()
    if _tiled(flat, stacked) and choose("lora_down", flat.device, ["triton"]) == "triton":
        from .kernels.lora import down

        return down(flat, stacked, dropout, seed)
    return lora_dropout.zeroed(flat, dropout, seed) @ stacked.t()


def _up_backward(grad: Tensor, b: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dh [T, r] in grad's type and dB [out, r] in B's, of grad [T, out], B and h [T, r]."""
    cast = b.to(grad.dtype)
    if _reads_once(grad, h) and choose("lora_up_backward", grad.device, ["triton"]) == "triton":
        from .kernels.lora import up_backward

        dh, db = up_backward(grad, cast, h, scale)
        return dh, db.to(b.dtype)
    return (grad @ cast).mul_(scale), (h.t() @ grad).t().to(b.dtype, copy=True).contiguous().mul_(scale)


def _down_backward(
    flat: Tensor, dh: Tensor, stacked: Tensor, dx: Tensor | None, dropout: float, seed: int | None
) -> Tensor:
    """dA [r, in]; what goes through A is added to dx [T, in] in place."""
    if seed is None:
        if dx is not None:
            dx.addmm_(dh, stacked)
        return dh.t() @ flat
    if _tiled(flat, stacked) and choose("lora_down_backward", flat.device, ["triton"]) == "triton":
        from .kernels.lora import down_backward

        return down_backward(flat, dh, stacked, dx, dropout, seed)
    return lora_dropout.backward(flat, dh, stacked, dx, dropout, seed)


def _tiled(flat: Tensor, stacked: Tensor) -> bool:
    """Whether the kernels are for these: types of 16 bits, and ranks that fit a tile."""
    return flat.dtype.itemsize == 2 and stacked.shape[0] <= 64


def _reads_once(grad: Tensor, h: Tensor) -> bool:
    """Whether one pass over grad moves fewer bytes than two, counting the partial sums of both results."""
    (rows, columns), rank = grad.shape, h.shape[1]
    if grad.dtype.itemsize != 2 or rank > 16:
        return False
    partial = 8 * rank * (columns * -(-rows // UP_ROWS) + rows * -(-columns // UP_COLUMNS))
    return partial < rows * columns * grad.dtype.itemsize


UP_ROWS, UP_COLUMNS = 512, 512
"""Of the tile whose partial sums one program of the kernel for dh and dB writes."""


def _stacked(group: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    parts = [part.a.to(dtype) for part in group if part.a is not None]
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        settings: tuple[float, float, Any],
        seed: int | None,
    ) -> Tensor:
        dtype = computing_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            (y,), h = forward_group(flat, [Projection(weight, bias, a, b, *settings)], seed)
        ctx.save_for_backward(flat, h, weight, a, b)
        ctx.settings, ctx.seed, ctx.shape, ctx.x_dtype = settings, seed, x.shape, x.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        flat, h, weight, a, b = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        group = [Projection(weight, None, a, b, *ctx.settings)]
        dx, ((da, db),) = backward_group(flat, h, [grad], group, ctx.needs_input_grad[0], ctx.seed)
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.x_dtype)
        return dx, None, None, da, db, None, None
