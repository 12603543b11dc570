"""Distillation loss over a linear output head, chunk by chunk: all logits never exist at once.

    q = softmax(t / T),  p = softmax(z / T),   z = h W^T + b the student's logits, t the teacher's
    loss = sum_i  alpha T^2 KL(q_i || p_i)  +  (1 - alpha) (-log softmax(z_i)[label])
    dz   = alpha T (p - q)  +  (1 - alpha) (softmax(z) - onehot(label))

(Hinton, Vinyals, Dean, arXiv:1503.02531, section 2.) With only the teacher's k likeliest tokens I known, all
other tokens are one event of probability q_r = 1 - sum_I q, and of p_r = 1 - sum_I p for the student:

    KL = sum_I q log(q / p) + q_r log(q_r / p_r)
    dz_j = alpha T (p_j - q_j) for j in I, alpha T p_j (1 - q_r / p_r) for the others

which never exceeds the whole KL, and is the whole KL for k = V. The gradients are computed in forward, where
the logits are, and only scaled in backward. The softmax is float32 inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import computing_dtype

# Elements of one chunk of logits, of which five live at once: 16 MB each in float32.
CHUNK = 4 * 2**20


@dataclass(frozen=True)
class TopTokens:
    """A distribution by its k likeliest tokens.

    indices int64 [n, k]; log_probs [n, k]; log_rest [n], the logarithm of the probability of all other
    tokens together, -inf where there are none.
    """

    indices: Tensor
    log_probs: Tensor
    log_rest: Tensor

    def __getitem__(self, part: slice) -> TopTokens:
        return TopTokens(self.indices[part], self.log_probs[part], self.log_rest[part])


TeacherPart = Callable[[slice], Tensor | TopTokens]
"""Positions -> the teacher's logits [c, V], or its likeliest tokens at the temperature of the loss."""


def top_tokens(logits: Tensor, k: int, temperature: float) -> TopTokens:
    """The k likeliest tokens of softmax(logits / temperature); logits [n, V]."""
    scores = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = torch.log_softmax(scores / temperature, dim=1)
    found, indices = log_probs.topk(k, dim=1)
    return TopTokens(indices, found, _log_of_others(log_probs, indices))


def distillation_sums(
    hidden: Tensor,
    head_weight: Tensor | None,
    labels: Tensor,
    teacher: TeacherPart,
    *,
    alpha: float,
    temperature: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, KL(q || p) at the temperature, cross entropy at 1): sums over positions, float32 scalars.

    hidden [N, H], head_weight [V, H], labels int64 [N], bias [V]; with head_weight None `hidden` is the
    logits [N, V]. Gradients of the loss reach hidden, weight and bias, each where it wants one; the other two
    sums have none. Not twice differentiable. The teacher has as many tokens as the student.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not match")
    sums: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(  # type: ignore[no-untyped-call]  # torch has no types here
        hidden, head_weight, bias, labels, teacher, alpha, temperature, torch.is_grad_enabled()
    )
    return sums


def reference(
    logits: Tensor, labels: Tensor, teacher: Tensor | TopTokens, *, alpha: float, temperature: float
) -> Tensor:
    """The loss by its formula, all logits [N, V] at once."""
    log_p = torch.log_softmax(logits / temperature, dim=1)
    if isinstance(teacher, TopTokens):
        rest = _log_of_others(log_p, teacher.indices)
        log_p = torch.cat([log_p.gather(1, teacher.indices), rest[:, None]], dim=1)
        log_q = torch.cat([teacher.log_probs, teacher.log_rest[:, None]], dim=1)
    else:
        log_q = torch.log_softmax(teacher / temperature, dim=1)
    terms = torch.where(log_q.isneginf(), torch.zeros_like(log_q), log_q.exp() * (log_q - log_p))
    hard = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return alpha * temperature**2 * terms.sum() + (1 - alpha) * hard


def _log_of_others(log_probs: Tensor, indices: Tensor) -> Tensor:
    """[n]: the logarithm of the probability outside `indices` [n, k]; -inf where nothing is outside."""
    return log_probs.scatter(1, indices, float("-inf")).logsumexp(dim=1)


def _divergence(log_p: Tensor, teacher: Tensor | TopTokens, temperature: float) -> tuple[Tensor, Tensor]:
    """KL summed over the chunk, and its gradient by z / T; log_p [c, V] is used up."""
    if not isinstance(teacher, TopTokens):
        log_q = torch.log_softmax(teacher.to(log_p.dtype).div(temperature), dim=1)
        q = log_q.exp()
        kl = log_q.sub_(log_p).mul_(q).masked_fill_(q == 0, 0.0).sum()  # a token may be impossible
        return kl, log_p.exp_().sub_(q)
    indices, log_q, log_rest = teacher.indices, teacher.log_probs.to(log_p.dtype), teacher.log_rest
    log_rest = log_rest.to(log_p.dtype)
    log_top, q = log_p.gather(1, indices), log_q.exp()
    excess = log_rest - _log_of_others(log_p, indices)
    some = ~log_rest.isneginf()
    kl = (q * (log_q - log_top)).masked_fill_(q == 0, 0.0).sum() + (log_rest.exp() * excess)[some].sum()
    share = torch.where(some, 1.0 - excess.exp(), torch.ones_like(excess))
    slope = log_p.exp_().mul_(share[:, None])
    return kl, slope.scatter_(1, indices, log_top.exp() - q)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        labels: Tensor,
        teacher: TeacherPart,
        alpha: float,
        temperature: float,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = (
            with_gradient and wanted for wanted in ctx.needs_input_grad[:3]
        )
        dtype = computing_dtype(hidden)
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        h, w = hidden.to(dtype), None if weight is None else weight.to(dtype)
        vocabulary = h.shape[1] if weight is None else weight.shape[0]
        kl, hard = (torch.zeros((), dtype=inner, device=h.device) for _ in range(2))
        grad_hidden = torch.empty_like(h) if wants_hidden else None
        grad_weight = None
        if wants_weight and weight is not None:
            grad_weight = torch.zeros(weight.shape, dtype=inner, device=h.device)
        grad_bias = torch.zeros(vocabulary, dtype=inner, device=h.device) if wants_bias else None
        rows = max(1, CHUNK // vocabulary)
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, len(h), rows):
                part = slice(start, start + rows)
                column = labels[part, None]
                logits = h[part] if w is None else h[part] @ w.t()
                if bias is not None:
                    logits = logits + bias
                logits = logits.to(inner, copy=w is None)  # it is worked on in place
                log_sum = logits.logsumexp(dim=1, keepdim=True)
                hard += (log_sum - logits.gather(1, column)).sum()
                divergence, slope = _divergence(
                    torch.log_softmax(logits / temperature, dim=1), teacher(part), temperature
                )
                kl += divergence
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                slope.mul_(alpha * temperature)
                if alpha < 1:
                    slope.add_(logits.sub_(log_sum).exp_(), alpha=1 - alpha)
                    # slow in bfloat16 alone, which this never is
                    slope.scatter_add_(1, column, torch.full_like(column, alpha - 1, dtype=inner))
                if grad_bias is not None:
                    grad_bias += slope.sum(dim=0)
                slope = slope.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = slope if w is None else slope @ w
                if grad_weight is not None:
                    grad_weight += slope.t() @ h[part]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [None if given is None else given.dtype for given in (hidden, weight, bias)]
        ctx.mark_non_differentiable(kl, hard)
        return alpha * temperature**2 * kl + (1 - alpha) * hard, kl, hard

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_others: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if saved is None else (saved * grad_loss).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None, None)
