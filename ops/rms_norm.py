"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467) with a backward in few passes.

    r = 1 / sqrt(mean(x^2) + eps),   n = x r,   y = n w
    dx = r (g w - n mean(g w n)),   dw = sum over tokens of g n

float32 inside; n is rounded to the input's type before the weight, as in transformers. Only x and one number
a token are kept for backward; plain autograd keeps three float32 copies of x. On CUDA Liger's kernels do it
where it is installed; torch.compile gets the formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import liger
from .providers import choose


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> [..., H]; gradients reach x, and the weight where it is trained."""
    if torch.compiler.is_compiling():  # which makes one kernel of the formula
        return reference(x, weight, eps)
    if choose("rms_norm", x.device, liger.offers("rms_norm", x, weight)) == "liger":
        return liger.rms_norm(x, weight, eps)
    output: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]  # torch has no types here
    return output


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same by its formula, as transformers writes it."""
    inner = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = inner * torch.rsqrt(inner.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inner = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(inner, dim=-1, keepdim=True)
        scale = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (inner * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            through = (grad * weight).to(scale.dtype)
            along = (through * normed).mean(dim=-1, keepdim=True)
            dx = through.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)
        return dx, dweight, None
