"""Linear layers that keep a sample of their input's rows, WTA-CRS (Liu et al., arXiv 2305.15265).

    y = x W^T + b,   dx = g W,   db = sum_i g_i,   dW = sum_i g_i x_i^T  over the N rows (tokens)

Only dW needs x, and dW is a sum over rows, so k of them estimate it. Row i has the probability
p_i = |x_i| / sum |x| (|g_i| would belong into it, but is not known in the forward pass). The winners C, the c
rows of the largest p, are taken as they are; the other k - c are drawn with replacement from the rest:

    dW ~ sum_{i in C} g_i x_i^T + sum_{j drawn} w_j g_j x_j^T,   w_j = (1 - P_C) / (p_j (k - c))

where P_C is the sum of p over C, and c < k minimises (1 - P_C) / (k - c), the factor in the paper's bound
on the variance. The expectation of the right side is dW. The input's gradient and the bias's stay exact.

Layers that read the same tensor (q, k and v; gate and up) share one sample, whose rows are kept once.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import computing_dtype
from .gathered import gathered_product


def choose_rows(norms: Tensor, k: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """norms [N], not negative -> indices [k] (int64) and weights [k] (norms' type); drawn rows may repeat.

    With k >= N all N rows in their order, each of weight 1. Otherwise nothing is read back to the host, and
    the shapes do not depend on the values. Without `generator` torch's own of that device is used.
    Raises ValueError for k < 1 with rows to choose from.
    """
    rows = norms.shape[0]
    if k >= rows:
        return torch.arange(rows, device=norms.device), torch.ones_like(norms)
    if k < 1:
        raise ValueError(f"k={k} rows cannot stand for {rows}; k must be at least 1")
    # A running sum over a long batch outgrows float32: small rows at its end would get odd probabilities.
    wide = torch.float32 if norms.device.type == "mps" else torch.float64
    ascending, order = norms.to(wide).sort()
    below = ascending.cumsum(0)  # [i]: sum of all rows up to the i-th smallest
    ranks = torch.arange(k, device=norms.device)
    rest = below.flip(0)[:k]  # [c]: what is left without the c largest; (1 - P_C) times the sum of all
    winners = torch.argmin(rest / (k - ranks))
    left = rest[winners]
    draws = torch.rand(k, dtype=wide, device=norms.device, generator=generator) * left
    # Rounding may put a draw on the upper edge; a row of norm zero is never hit, its step in `below` is flat.
    drawn = torch.searchsorted(below, draws, right=True).clamp(max=rows - 1 - winners)
    taken = ranks < winners
    position = torch.where(taken, rows - 1 - ranks, drawn)
    tiny = torch.finfo(wide).tiny  # all norms zero: weights of zero, not of 0 / 0
    weights = left / (ascending[position].clamp(min=tiny) * (k - winners))
    return order[position], torch.where(taken, 1.0, weights).to(norms.dtype)


def sampled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, ratio: float, shared: SharedSample | None = None
) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out] in x's computing type.

    For the weight's gradient ceil(ratio * N) of the N rows of x are kept; all other gradients are exact. With
    ratio 1, or where the weight wants no gradient, it is the plain linear layer. `shared` finds the sample of
    a layer that has read this x before. Raises ValueError for a ratio outside (0, 1].
    """
    _check(ratio)
    rows = math.prod(x.shape[:-1])
    k = math.ceil(ratio * rows - 1e-9)  # 0.1 * 30 is a little more than 3
    if k >= rows or not (torch.is_grad_enabled() and weight.requires_grad):
        return nn.functional.linear(x, weight, bias)
    kept, indices = (shared or SharedSample()).draw(x, k)
    output: Tensor = _SampledLinear.apply(  # type: ignore[no-untyped-call]  # torch has no types here
        x, weight, bias, kept, indices
    )
    return output


def reference(x: Tensor, grad: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The estimate of dW by its formula: x [N, in], grad [N, out], a choice of rows -> [out, in]."""
    total = torch.zeros(grad.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    for index, weight in zip(indices.tolist(), weights.tolist(), strict=True):
        total += weight * torch.outer(grad[index], x[index])
    return total


class _SampledLinear(torch.autograd.Function):
    """`kept` [k, in]: the chosen rows of x in the computing type, times their weights; `indices` [k]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, indices: Tensor
    ) -> Tensor:
        dtype = kept.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        ctx.save_for_backward(weight, kept, indices)
        ctx.shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, indices = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ weight.to(grad.dtype)).view(ctx.shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            dw = gathered_product(grad, indices, kept, weight.dtype)
        if ctx.needs_input_grad[2]:
            db = grad.sum(0, dtype=ctx.bias_dtype)
        return dx, dw, db, None, None


@dataclass(frozen=True)
class _Last:
    """What was sampled, and the sample; only referred to, never kept."""

    x: weakref.ref[Tensor]
    version: int
    k: int
    dtype: torch.dtype
    kept: weakref.ref[Tensor]
    indices: weakref.ref[Tensor]


class SharedSample:
    """The sample of the input seen last, for the next layer that reads the same tensor.

    The same is the very tensor object, not changed in place since: the guard that autograd has for tensors
    that it saves. All references are weak: the sample lives as long as a backward pass needs it, and where it
    or the input is gone, a new one is drawn.
    """

    def __init__(self) -> None:
        self._last: _Last | None = None

    def __reduce__(self) -> tuple[type[SharedSample], tuple[()]]:
        """A copied or saved model starts with an empty one."""
        return SharedSample, ()

    @torch.no_grad()
    def draw(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """x [..., in] -> k rows times their weights [k, in] in x's computing type, and their indices [k]."""
        last, dtype = self._last, computing_dtype(x)
        if last is not None and last.x() is x:
            kept, indices = last.kept(), last.indices()
            same = (last.version, last.k, last.dtype) == (x._version, k, dtype)
            if same and kept is not None and indices is not None:
                return kept, indices
        flat = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(flat.dtype, torch.float32)
        indices, weights = choose_rows(torch.linalg.vector_norm(flat, dim=-1, dtype=wide), k)
        # The weights go into the rows: those of the drawn rows all get one length, so nothing overflows.
        kept = (flat.index_select(0, indices) * weights[:, None]).to(dtype)
        refs = (weakref.ref(kept), weakref.ref(indices))
        self._last = _Last(weakref.ref(x), x._version, k, dtype, *refs)
        return kept, indices


class SampledLinear(nn.Linear):
    """nn.Linear with `sampled_linear` for a forward while it trains, and its own otherwise."""

    wta_crs_ratio: float
    wta_crs_shared: SharedSample

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not self.training:
            return super().forward(input)
        return sampled_linear(input, self.weight, self.bias, self.wta_crs_ratio, self.wta_crs_shared)


def use_wta_crs(model: nn.Module, ratio: float) -> list[str]:
    """Let the trained nn.Linear layers of `model` keep `ratio` of their input's rows; one line for the log.

    Instances change their class; names, parameters and saved files stay as they were. Left alone: the output
    head, layers whose weight is frozen, other classes than nn.Linear, and adapters. Called again, it sets the
    new ratio. Raises ValueError for a ratio outside (0, 1].
    """
    _check(ratio)
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    adapted = [module for module in model.modules() if isinstance(module, PeftLinear)]
    adapters = {part for layer in adapted for part in layer.modules()}
    shared = SharedSample()
    count = 0
    module: Any
    for module in model.modules():
        if type(module) not in (nn.Linear, SampledLinear) or module is head or module in adapters:
            continue
        if module.weight.requires_grad:
            module.__class__ = SampledLinear
            module.wta_crs_ratio, module.wta_crs_shared = ratio, shared
            count += 1
    return [f"wta-crs: {count} linear layers keep {ratio:.3g} of their input's rows"] if count else []


def _check(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} is not a share of the rows; it must be above 0 and at most 1")
