"""Log-probability of each label under a linear output head, chunk by chunk: all logits never exist at once.

    z = h W^T + b,   z <- c tanh(z / c) with a softcap c,   out_i = z_i,label - log sum_v exp z_iv
    dz_i = g_i (onehot(label) - softmax(z_i))   (times 1 - (z / c)^2)
    dh = dz W,   dW = dz^T h,   db = sum_i dz_i

What weighs a position (an answer's place in a preference loss) is known only when all positions have been
seen, so the logits are computed again in backward, one chunk at a time. Between the two passes there is one
float32 number a position. Logits are stored in the input's type (autocast is obeyed), the softmax is float32
inside, and the weight's gradient is summed in float32. On CUDA a chunk is one kernel's, in place
(ops/kernels/cross_entropy.py), elsewhere PyTorch's operations'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import computing_dtype
from .loss_heads import add_at_, capped_
from .providers import Provider, choose

# Logits in one chunk: 48 MB in float32; a GPU's products need more rows to be worth the reading of a weight.
CHUNK, CUDA_CHUNK = 12 * 2**20, 128 * 2**20


class _Given(NamedTuple):
    """What log-probabilities are of: hidden [N, H], weight [V, H], bias [V], labels [N]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    softcap: float | None


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
    dtype = computing_dtype(hidden)
    if torch.compiler.is_compiling():
        found: Tensor = log_probs_op(hidden.to(dtype), head_weight.to(dtype), bias, labels, softcap)[0]
        return found
    log_probs: Tensor = _TokenLogProbs.apply(hidden, head_weight, bias, labels, softcap, dtype)  # type: ignore[no-untyped-call]  # torch has no types here
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


def _provider(hidden: Tensor) -> Provider:
    known = hidden.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return choose("token_log_probs", hidden.device, ["triton"] if known else [])


def _chunk_rows(weight: Tensor) -> int:
    return max(1, (CHUNK if weight.device.type == "cpu" else CUDA_CHUNK) // weight.shape[0])


def _forward(given: _Given) -> tuple[Tensor, Tensor]:
    """Log-probabilities and log-sums [N]."""
    h, w, bias, labels, softcap = given
    inner = torch.promote_types(h.dtype, torch.float32)
    found, log_sum = (torch.empty(len(h), dtype=inner, device=h.device) for _ in range(2))
    in_place = _provider(h) == "triton"
    rows = _chunk_rows(w)
    with torch.autocast(h.device.type, enabled=False):
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            logits = h[part] @ w.t()
            if in_place:
                from .kernels.cross_entropy import losses_of_rows

                losses, log_sum[part] = losses_of_rows(
                    logits, labels[part], bias=bias, softcap=softcap, gradient=False
                )
                found[part] = losses.neg_()
            else:
                capped_(logits, bias, softcap)
                log_sum[part] = torch.logsumexp(logits.to(inner), dim=1)
                found[part] = logits.gather(1, labels[part, None]).squeeze(1).to(inner) - log_sum[part]
            del logits  # or they would stand beside the next chunk's
    return found, log_sum


def _backward(grad: Tensor, given: _Given, log_sum: Tensor, wants: Sequence[bool]) -> list[Tensor | None]:
    """Gradients by hidden, in its type, and by weight and bias, in float32."""
    h, w, bias, labels, softcap = given
    inner = log_sum.dtype
    # contiguous whatever the strides are: so a compiled graph has been told
    grad_hidden = torch.empty_like(h, memory_format=torch.contiguous_format) if wants[0] else None
    grad_weight = torch.zeros(w.shape, dtype=inner, device=h.device) if wants[1] else None
    grad_bias = torch.zeros(w.shape[0], dtype=inner, device=h.device) if wants[2] else None
    in_place = _provider(h) == "triton"
    rows = _chunk_rows(w)
    with torch.autocast(h.device.type, enabled=False):
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            slope = logits = h[part] @ w.t()
            if in_place:
                from .kernels.cross_entropy import slopes_of_rows

                slopes_of_rows(slope, labels[part], -grad[part], log_sum[part], bias=bias, softcap=softcap)
            else:
                capped_(logits, bias, softcap)
                slope = (logits.to(inner) - log_sum[part, None]).exp_().mul_(-grad[part, None])
                add_at_(slope, labels[part], grad[part])
                if softcap is not None:
                    slope.mul_(logits.to(inner).div_(softcap).square_().neg_().add_(1.0))
            if grad_bias is not None:
                grad_bias += slope.sum(dim=0, dtype=inner)
            slope = slope.to(h.dtype)
            if grad_hidden is not None:
                torch.mm(slope, w, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += slope.t() @ h[part]
            del logits, slope
    return [grad_hidden, grad_weight, grad_bias]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        found, log_sum = _forward(_Given(hidden.to(dtype), weight.to(dtype), bias, labels, softcap))
        ctx.save_for_backward(hidden, weight, bias, labels, log_sum)
        ctx.softcap, ctx.computing = softcap, dtype
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, log_sum = ctx.saved_tensors
        dtype = ctx.computing
        given = _Given(hidden.to(dtype), weight.to(dtype), bias, labels, ctx.softcap)
        found = _backward(grad, given, log_sum, ctx.needs_input_grad[:3])
        gradients = [
            None if g is None else g.to(one.dtype)
            for g, one in zip(found, (hidden, weight, bias), strict=True)
        ]
        return (*gradients, None, None, None)


@torch.library.custom_op("shoestring::token_log_probs", mutates_args=())
def log_probs_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
) -> list[Tensor]:
    """`token_log_probs` as an operation that torch.compile keeps whole, and what its backward reads [N]."""
    return list(_forward(_Given(hidden, weight, bias, labels, softcap)))


@log_probs_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    hidden = _Given(*arguments).hidden
    inner = torch.promote_types(hidden.dtype, torch.float32)
    return [hidden.new_empty(len(hidden), dtype=inner) for _ in range(2)]


@torch.library.custom_op("shoestring::token_log_probs_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    log_sum: Tensor,
    wants: list[bool],
) -> list[Tensor]:
    """Gradients by hidden, weight and bias, in their types; of one that is not wanted an empty tensor."""
    found = _backward(grad, _Given(hidden, weight, bias, labels, softcap), log_sum, wants)
    return [
        hidden.new_empty(0) if g is None or one is None else g.to(one.dtype)
        for g, one in zip(found, (hidden, weight, bias), strict=True)
    ]


@backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    given, wants = arguments[1:4], arguments[-1]
    return [
        torch.empty_like(one, memory_format=torch.contiguous_format)
        if one is not None and wanted
        else given[0].new_empty(0)
        for one, wanted in zip(given, wants, strict=True)
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, softcap = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.softcap = softcap


def _back(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    *tensors, log_sum = ctx.saved_tensors
    if grads[0] is None:
        return None, None, None, None, None
    wants = list(ctx.needs_input_grad[:3])
    found = backward_op(grads[0], *tensors, ctx.softcap, log_sum, wants)
    return (*(g if wanted else None for g, wanted in zip(found, wants, strict=True)), None, None)


log_probs_op.register_autograd(_back, setup_context=_keep)
