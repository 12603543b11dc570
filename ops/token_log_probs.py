"""Log-probability of each label under a linear output head, chunk by chunk: all logits never exist at once.

    z = h W^T + b,   z <- c tanh(z / c) with a softcap c,   out_i = z_i,label - log sum_v exp z_iv
    dz_i = g_i (onehot(label) - softmax(z_i))   (times 1 - (z / c)^2)
    dh = dz W,   dW = dz^T h,   db = sum_i dz_i

What weighs a position (an answer's place in a preference loss) is known only when all positions have been
seen, so the logits are computed again in backward, one chunk at a time. Between the two passes there is one
float32 number a position. Logits are stored in the input's type (autocast is obeyed), the softmax is float32
inside, and the weight's gradient is summed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import computing_dtype

# Elements of one chunk of logits: 48 MB in float32.
CHUNK = 12 * 2**20


def token_log_probs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(hidden @ head_weight.T + bias)[label] of each position: float32 [N].

    hidden [N, H], head_weight [V, H], labels int64 [N], bias [V]. Gradients reach hidden, the weight and the
    bias, each where it wants one; not twice differentiable. float64 stays float64.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not match")
    log_probs: Tensor = _TokenLogProbs.apply(hidden, head_weight, bias, labels, softcap)  # type: ignore[no-untyped-call]  # torch has no types here
    return log_probs


def reference(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same by its formula, all logits at once."""
    logits = nn.functional.linear(hidden, head_weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = h @ w.t()
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
    ) -> Tensor:
        dtype = computing_dtype(hidden)
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        h, w = hidden.to(dtype), weight.to(dtype)
        wanted, log_sum = (torch.empty(len(h), dtype=inner, device=h.device) for _ in range(2))
        rows = max(1, CHUNK // weight.shape[0])
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, len(h), rows):
                part = slice(start, start + rows)
                logits = _logits(h[part], w, bias, softcap)
                wanted[part] = logits.gather(1, labels[part, None]).squeeze(1).to(inner)
                log_sum[part] = torch.logsumexp(logits.to(inner), dim=1)
        ctx.save_for_backward(hidden, weight, bias, labels, log_sum)
        ctx.softcap, ctx.computing = softcap, dtype
        return wanted - log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, log_sum = ctx.saved_tensors
        dtype, softcap = ctx.computing, ctx.softcap
        inner = log_sum.dtype
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        h, w = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(h) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=inner, device=h.device) if wants_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=inner, device=h.device) if wants_bias else None
        rows = max(1, CHUNK // weight.shape[0])
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, len(h), rows):
                part = slice(start, start + rows)
                column, factor = labels[part, None], grad[part, None]
                logits = _logits(h[part], w, bias, softcap)
                slope = (logits.to(inner) - log_sum[part, None]).exp_().mul_(-factor)
                slope.scatter_add_(1, column, factor)
                if softcap is not None:
                    slope.mul_(logits.to(inner).div_(softcap).square_().neg_().add_(1.0))
                if grad_bias is not None:
                    grad_bias += slope.sum(dim=0)
                slope = slope.to(dtype)
                if grad_hidden is not None:
                    torch.mm(slope, w, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight += slope.t() @ h[part]
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )
