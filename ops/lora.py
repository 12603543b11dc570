"""Frozen linear layers with LoRA adapters as one operation (Hu et al., arXiv 2106.09685).

    h = x A^T,   y = x W^T + b + s h B^T
    dh = s g B,  dx = g W + dh A,   dA = dh^T x,   dB = s g^T h

PEFT's own forward makes three output-sized temporaries, and with float32 adapters on a bf16 base it runs its
matmuls in float32. Here A and B (float32 masters) are cast once, both products are accumulated into the base
product's own memory by `addmm`, and only x and the skinny h are kept for backward. Layers that read the same
x (gate and up) form a group: their A are stacked into one skinny matmul, and dx has one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import computing_dtype


@dataclass(frozen=True)
class Projection:
    """weight [out, in], bias [out] or None, a [r, in] and b [out, r] or both None, scaling."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The four tensors, as an autograd function takes them."""
        return self.weight, self.bias, self.a, self.b


def lora_linear(x: Tensor, projection: Projection) -> Tensor:
    """x [..., in] -> [..., out] in x's computing type; gradients reach x, a and b.

    Raises ValueError where weight or bias wants a gradient: the base is frozen.
    """
    check_frozen(projection)
    output: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]  # torch has no types here
        x, *projection.tensors, projection.scaling
    )
    return output


def reference(x: Tensor, projection: Projection) -> Tensor:
    """The same by its formula."""
    output = nn.functional.linear(x, projection.weight, projection.bias)
    if projection.a is None or projection.b is None:
        return output
    return output + (x @ projection.a.t() @ projection.b.t()) * projection.scaling


def check_frozen(*projections: Projection) -> None:
    """Raise ValueError if a weight or a bias wants a gradient that these operations would not give it."""
    if not torch.is_grad_enabled():
        return
    for projection in projections:
        bias = projection.bias
        if projection.weight.requires_grad or (bias is not None and bias.requires_grad):
            raise ValueError("a LoRA operation keeps its base frozen, but the base wants a gradient")


def forward_group(flat: Tensor, group: Sequence[Projection]) -> tuple[list[Tensor], Tensor | None]:
    """flat [T, in] -> outputs [T, out] of each projection, and h [T, ranks of all], None without adapters."""
    dtype = flat.dtype
    stacked = _stacked(group, dtype)
    h = None if stacked is None else flat @ stacked.t()
    outputs = []
    first = 0
    for part in group:
        bias = None if part.bias is None else part.bias.to(dtype)
        y = nn.functional.linear(flat, part.weight.to(dtype), bias)
        if h is not None and part.a is not None and part.b is not None:
            rank = part.a.shape[0]
            y.addmm_(h[:, first : first + rank], part.b.to(dtype).t(), alpha=part.scaling)
            first += rank
        outputs.append(y)
    return outputs, h


def backward_group(
    flat: Tensor, h: Tensor | None, grads: Sequence[Tensor], group: Sequence[Projection], wants_x: bool
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
        pieces.append((grad @ part.b.to(dtype)).mul_(part.scaling))
        high.append((grad.t() @ h[:, first : first + rank]).to(part.b.dtype).mul_(part.scaling))
        first += rank
    dh = None if not pieces else pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    dx: Tensor | None = None
    if wants_x:
        for grad, part in zip(grads, group, strict=True):
            weight = part.weight.to(dtype)
            dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
        if dx is not None and dh is not None and stacked is not None:
            dx.addmm_(dh, stacked)
    low = None if dh is None else dh.t() @ flat
    gradients: list[tuple[Tensor | None, Tensor | None]] = []
    first = 0
    for part, db in zip(group, high, strict=True):
        if low is None or part.a is None:
            gradients.append((None, None))
            continue
        rank = part.a.shape[0]
        gradients.append((low[first : first + rank].to(part.a.dtype), db))
        first += rank
    return dx, gradients


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
        scaling: float,
    ) -> Tensor:
        dtype = computing_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            (y,), h = forward_group(flat, [Projection(weight, bias, a, b, scaling)])
        ctx.save_for_backward(flat, h, weight, a, b)
        ctx.scaling, ctx.shape, ctx.x_dtype = scaling, x.shape, x.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        flat, h, weight, a, b = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        group = [Projection(weight, None, a, b, ctx.scaling)]
        dx, ((da, db),) = backward_group(flat, h, [grad], group, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape).to(ctx.x_dtype), None, None, da, db, None


def projection_of(module: nn.Module) -> Projection | None:
    """What a frozen nn.Linear or a PEFT layer that is plain LoRA at this moment computes, else None.

    Plain: one active adapter, on, not merged, no variant (DoRA and its like), no dropout at work, no bias of
    its own, and a frozen base that is an ordinary nn.Linear.
    """
    if type(module) is nn.Linear:
        return _frozen(Projection(module.weight, module.bias, None, None))
    if not isinstance(module, PeftLinear) or module.fan_in_fan_out:
        return None
    base = module.get_base_layer()
    if type(base) is not nn.Linear:
        return None
    if module.disable_adapters:
        return None if module.merged else _frozen(Projection(base.weight, base.bias, None, None))
    if module.merged:
        return _frozen(Projection(base.weight, base.bias, None, None))
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.lora_variant or module.lora_bias[names[0]]:
        return None
    name = names[0]
    if module.training and not isinstance(module.lora_dropout[name], nn.Identity):
        return None
    a, b = module.lora_A[name], module.lora_B[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return None
    scaling = float(module.scaling[name])
    return _frozen(Projection(base.weight, base.bias, a.weight, b.weight, scaling))


def _frozen(projection: Projection) -> Projection | None:
    bias = projection.bias
    trained = projection.weight.requires_grad or (bias is not None and bias.requires_grad)
    return None if trained else projection


class FusedLoraLinear(PeftLinear):
    """PEFT's LoRA layer with `lora_linear` for a forward, and PEFT's own wherever that would not be exact."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        projection = None if args or kwargs else projection_of(self)
        if projection is None or projection.a is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return lora_linear(x, projection)
