"""A linear layer with a LoRA adapter as one operation (Hu et al., arXiv 2106.09685).

    h = x A^T,   y = x W^T + b + s h B^T
    dh = s g B,  dx = g W + dh A,   dA = dh^T x,   dB = s g^T h

PEFT's own forward makes three output-sized temporaries, and with float32 adapters on a bf16 base it runs its
matmuls in float32. Here A and B (float32 masters) are cast once, both products are accumulated into the base
product's own memory by `addmm`, and only x (which neighbours share) and the skinny h are kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import computing_dtype


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """x [..., in], weight [out, in], bias [out], a [r, in], b [out, r] -> [..., out] in x's computing type.

    Gradients reach x, a and b; the base is frozen: raises ValueError where weight or bias wants one.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("lora_linear keeps its base frozen, but the base wants a gradient")
    output: Tensor = _LoraLinear.apply(x, weight, bias, a, b, scaling)  # type: ignore[no-untyped-call]  # torch has no types here
    return output


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The same by its formula."""
    return nn.functional.linear(x, weight, bias) + (x @ a.t() @ b.t()) * scaling


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        dtype = computing_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            w, low, high = weight.to(dtype), a.to(dtype), b.to(dtype)
            h = flat @ low.t()
            y = nn.functional.linear(flat, w, None if bias is None else bias.to(dtype))
            y.addmm_(h, high.t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, h, a, b)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (x.dtype, a.dtype, b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, h, a, b = ctx.saved_tensors
        dtype = flat.dtype
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        low, high = a.to(dtype), b.to(dtype)
        dh = (grad @ high).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(grad, weight.to(dtype)).addmm_(dh, low).view(ctx.shape).to(x_dtype)
        da = (dh.t() @ flat).to(a_dtype) if ctx.needs_input_grad[3] else None
        db = (grad.t() @ h).to(b_dtype).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None


def plain_lora(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
    """(weight, bias, A, B, scaling) of a PEFT linear layer that is plain LoRA at this moment, else None.

    Plain: one active adapter, on, not merged, no variant (DoRA and its like), no dropout at work, no bias of
    its own, and a frozen base that is an ordinary nn.Linear.
    """
    if not isinstance(module, PeftLinear) or module.disable_adapters or module.merged:
        return None
    base = module.get_base_layer()
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or type(base) is not nn.Linear:
        return None
    name = names[0]
    dropout = module.lora_dropout[name]
    works = not isinstance(dropout, nn.Identity) and module.training
    if works or module.lora_variant or module.lora_bias[name] or module.fan_in_fan_out:
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    a, b = module.lora_A[name], module.lora_B[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return None
    return base.weight, base.bias, a.weight, b.weight, float(module.scaling[name])


class FusedLoraLinear(PeftLinear):
    """PEFT's LoRA layer with `lora_linear` for a forward, and PEFT's own wherever that would not be exact."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        parts = None if args or kwargs else plain_lora(self)
        if parts is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return lora_linear(x, *parts)
