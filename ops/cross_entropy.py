"""Linear layer and cross entropy in one, chunk by chunk: the logits of all positions never exist at once.

    z = h W^T + b,   z <- c tanh(z / c) with a softcap c,   loss = sum_i log(sum_v exp z_iv) - z_i,label
    dz = softmax(z) - onehot(label)   (times 1 - (z / c)^2),   dh = dz W,   dW = dz^T h,   db = sum_i dz

The gradients are computed in forward, where the logits are, and only scaled in backward: no logits are
computed twice, and what stays in memory is one tensor like `hidden` (and one like the weight, when it is
trained). Logits and probabilities are stored in the input's type (autocast is obeyed); the softmax is
float32 inside, and the loss and the weight's gradient are summed in float32. Idea of the gradient in forward:
Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import computing_dtype

# Elements of one chunk of logits: 24 MB in bf16, and as much again for the probabilities.
FROZEN_CHUNK = 12 * 2**20
# A trained weight adds a pass over a float32 tensor of its size to every chunk: larger chunks, fewer passes.
TRAINED_CHUNK = 48 * 2**20


def cross_entropy_sum(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Sum over positions of -log softmax(hidden @ head_weight.T + bias)[label]; float32 scalar.

    hidden [N, H], head_weight [V, H], labels int64 [N], bias [V]. Only positions that have a label belong in
    `hidden`: there is no ignore index. N = 0 gives 0 with zero gradients. Gradients reach hidden, the weight
    and the bias, each where it wants one; not twice differentiable.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not match")
    with_gradient = torch.is_grad_enabled()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, head_weight, bias, labels, softcap, with_gradient)  # type: ignore[no-untyped-call]  # torch has no types here
    return loss


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
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        with_gradient: bool,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = (
            with_gradient and wanted for wanted in ctx.needs_input_grad[:3]
        )
        dtype = computing_dtype(hidden)
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        h, w = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), dtype=inner, device=h.device)
        grad_hidden = torch.empty_like(h) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=inner, device=h.device) if wants_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=inner, device=h.device) if wants_bias else None
        rows = max(1, (TRAINED_CHUNK if wants_weight else FROZEN_CHUNK) // weight.shape[0])
        # one set of buffers for all chunks: fresh memory of this size costs more than the arithmetic on it
        shape = (min(rows, len(h)), weight.shape[0])
        scores, weights = (torch.empty(shape, dtype=dtype, device=h.device) for _ in range(2))
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, len(h), rows):
                part = slice(start, start + rows)
                column = labels[part, None]
                logits = torch.mm(h[part], w.t(), out=scores[: len(column)])
                if bias is not None:
                    logits += bias
                if softcap is not None:
                    logits = logits.div_(softcap).tanh_().mul_(softcap)
                wanted = logits.gather(1, column).to(inner)
                # the largest logit, and its probability: log-sum-exp without a second pass of exponentials
                largest = logits.amax(dim=1, keepdim=True).to(inner)
                probability = torch.softmax(logits, dim=1, out=weights[: len(column)])
                log_sum = largest - probability.amax(dim=1, keepdim=True).to(inner).log_()
                loss += (log_sum - wanted).sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                grad = probability.scatter_add_(1, column, torch.full_like(column, -1.0, dtype=dtype))
                if softcap is not None:
                    grad.mul_(logits.div_(softcap).square_().neg_().add_(1.0))
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0, dtype=inner)
                if grad_hidden is not None:
                    torch.mm(grad, w, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight += grad.t() @ h[part]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss if dtype == torch.float64 else loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if saved is None else (saved * grad_loss).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None)
