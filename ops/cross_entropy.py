"""Linear layer and cross entropy in one, chunk by chunk: the logits of all positions never exist at once.

    z = h W^T + b + u B^T,   z <- c tanh(z / c) with a softcap c,   L = log(sum_v exp z_v)
    loss = sum_i  L_i - (1 - e) z_i,label - e mean_v z_iv          with a label smoothing of e
    dz = softmax(z) - (1 - e) onehot(label) - e / V                (times 1 - (z / c)^2)
    dh = dz W,   dW = dz^T h,   db = sum_i dz,   du = dz B,   dB = dz^T u

u B^T is what an adapter of low rank on the head adds. Positions whose label is `ignore_index` are taken out
before the head sees them. The gradients are computed in forward, where the logits are, and only scaled in
backward: no logits are computed twice, and what stays in memory is one tensor like `hidden` (and one like the
weight, when it is trained). Logits and their gradients are stored in the input's type (autocast is obeyed);
the softmax is float32 inside, and the loss and the weight's gradient are summed in float32. Idea of the
gradient in forward: Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2. What does it: `loss_heads.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import computing_dtype
from .linear_head import HeadInputs, LossSettings
from .loss_heads import liger_cross_entropy_sum, loss_and_gradients, provider_of
from .providers import Provider


def cross_entropy_sum(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Sum over positions of -log softmax(hidden @ head_weight.T + bias)[label]; float32 scalar.

    hidden [N, H], head_weight [V, H], labels int64 [N], bias [V], low_rank (u [N, r], B [V, r]), whose
    product is added to the logits. ignore_index: the label of a position without one; None where all have
    one, which saves the device a wait. No label at all gives 0 with zero gradients. Gradients reach what
    wants one; not twice differentiable. Raises ValueError for shapes that do not match.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not match")
    dtype = computing_dtype(hidden)
    given = HeadInputs(hidden, head_weight, bias, *(low_rank or (None, None)))
    settings = LossSettings(softcap, label_smoothing, ignore_index)
    if torch.compiler.is_compiling():
        recording = torch.is_grad_enabled()
        wants = [recording and one is not None and one.requires_grad for one in given]
        found: Tensor = loss_op(*given.cast(dtype), labels, *settings, wants)[0]
        return found
    by_name: list[Provider] = ["liger"] if _liger_has(given, dtype) else []
    provider = provider_of(dtype, hidden.device, by_name)
    if provider == "liger":
        with torch.autocast(hidden.device.type, enabled=False):
            return liger_cross_entropy_sum(given.cast(dtype), labels, settings)
    recording = torch.is_grad_enabled()
    loss: Tensor = _LinearCrossEntropy.apply(*given, labels, settings, dtype, provider, recording)  # type: ignore[no-untyped-call]  # torch has no types here
    return loss


def reference(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The same by its formula, all logits at once."""
    logits = nn.functional.linear(hidden, head_weight, bias)
    if low_rank is not None:
        logits = logits + low_rank[0] @ low_rank[1].t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return nn.functional.cross_entropy(
        logits, labels, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def _liger_has(given: HeadInputs, dtype: torch.dtype) -> bool:
    """Whether Liger computes this: no low-rank terms, and it gives no gradient where hidden wants none."""
    trained = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given[1:])
    return dtype != torch.float64 and given.low is None and (given.hidden.requires_grad or not trained)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        high: Tensor | None,
        labels: Tensor,
        settings: LossSettings,
        dtype: torch.dtype,
        provider: Provider,
        recording: bool,
    ) -> Tensor:
        given = HeadInputs(hidden, weight, bias, low, high)
        wants = [recording and wanted for wanted in ctx.needs_input_grad[:5]]
        loss, gradients = loss_and_gradients(given.cast(dtype), labels, settings, wants, provider)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if one is None else one.dtype for one in given]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if saved is None else _scaled(saved, grad_loss, dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None, None)


def _scaled(saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * factor in `dtype`; CUDA rounds in the same kernel, a CPU needs a tensor between in any case."""
    if saved.device.type == "cuda":
        return torch.mul(saved, factor, out=torch.empty_like(saved, dtype=dtype))
    return (saved * factor).to(dtype)


@torch.library.custom_op("shoestring::linear_cross_entropy", mutates_args=())
def loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    smoothing: float,
    ignore_index: int | None,
    wants: list[bool],
) -> list[Tensor]:
    """The loss, and its gradients by the first five; of one that is not wanted an empty tensor.

    As an operation that torch.compile keeps whole; all but bias are of one type.
    """
    given = HeadInputs(hidden, weight, bias, low, high)
    settings = LossSettings(softcap, smoothing, ignore_index)
    provider = provider_of(hidden.dtype, hidden.device)
    loss, gradients = loss_and_gradients(given, labels, settings, wants, provider)
    return [
        loss,
        *(
            hidden.new_empty(0) if g is None or one is None else g.to(one.dtype)
            for g, one in zip(gradients, given, strict=True)
        ),
    ]


@loss_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    given, wants = HeadInputs(*arguments[:5]), arguments[-1]
    hidden = given.hidden
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return [
        loss,
        *(
            torch.empty_like(one, memory_format=torch.contiguous_format)
            if one is not None and wanted
            else hidden.new_empty(0)
            for one, wanted in zip(given, wants, strict=True)
        ),
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.wants = inputs[-1]
    ctx.save_for_backward(*output[1:])


def _scale(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    scaled = [
        (saved * grads[0]).to(saved.dtype) if wanted and grads[0] is not None else None
        for saved, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True)
    ]
    return (*scaled, None, None, None, None, None)


loss_op.register_autograd(_scale, setup_context=_keep)
