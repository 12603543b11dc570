"""The pass over a linear output head that `cross_entropy_sum` makes, chunk by chunk: loss and gradients.

Three implementations of what happens to a chunk, chosen as `loss_head`:

    triton   ops/kernels/cross_entropy.py: one kernel, in place; unasked wherever it runs
    torch    PyTorch's operations on two buffers: on a CPU, and where the kernel cannot run
    liger    Liger's `liger_fused_linear_cross_entropy` (arXiv 2410.10989), by name alone, with float32 for
             the weight's gradient: the same plan, without low-rank terms

Not offered, since they cannot be the best: PyTorch's own `linear_cross_entropy` passes over the weight's
gradient for up to 4 V / H chunks, adds it up in bfloat16 on CUDA, has neither softcap nor smoothing, and took
more than twice as long on a CPU; Cut Cross-Entropy (arXiv 2411.09009) computes all logits twice, which only
its filter of small gradients pays for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .linear_head import HeadInputs, LossSettings
from .providers import Provider, choose

# Logits in one buffer, by device and by whether the weight is trained, which adds a pass over a float32
# tensor of its size to every chunk: larger chunks, fewer passes. In bfloat16 24 and 96 MB, on CUDA 256 and
# 512 MB: there the products need about a thousand rows to be worth the reading of the weight.
CHUNK = {
    ("cpu", False): 12 * 2**20,
    ("cpu", True): 48 * 2**20,
    ("cuda", False): 128 * 2**20,
    ("cuda", True): 256 * 2**20,
}
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def rows_of_chunk(vocabulary: int, device: torch.device, trained: bool) -> int:
    """Positions whose logits exist at once; `trained`: whether the weight gets a gradient."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    return max(1, CHUNK[kind, trained] // vocabulary)


def provider_of(dtype: torch.dtype, device: torch.device, by_name: Sequence[Provider] = ()) -> Provider:
    """What works on a chunk of logits of `dtype`."""
    offered: list[Provider] = ["triton"] if dtype in _TYPES else []
    return choose("loss_head", device, offered, by_name)


def loss_and_gradients(
    given: HeadInputs, labels: Tensor, settings: LossSettings, wants: Sequence[bool], provider: Provider
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, a scalar, and its gradients by what is given where `wants` says so.

    hidden, weight, low and high are of one type, which the gradients by hidden and low have too; the others
    are float32 when there are several chunks (float64 of float64).
    """
    positions, given, labels, places = len(labels), *_labelled(given, labels, settings.ignore_index)
    hidden, weight, _, low, high = given
    count, vocabulary = len(hidden), weight.shape[0]
    inner = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=inner, device=hidden.device)
    totals = _Totals(given, wants, inner)
    rows = min(count, rows_of_chunk(vocabulary, hidden.device, wants[1]))
    # one set of buffers for all chunks: fresh memory of this size costs more than the arithmetic on it
    scores = hidden.new_empty((rows, vocabulary))
    second = hidden.new_empty((rows if provider == "torch" else 0, vocabulary))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, count, max(rows, 1)):
            part = slice(start, min(start + rows, count))
            logits = torch.mm(hidden[part], weight.t(), out=scores[: part.stop - start])
            if low is not None and high is not None:
                logits.addmm_(low[part], high.t())
            if provider == "triton":
                losses = _rows_in_place(logits, labels[part], given.bias, settings, any(wants))
                slope = logits
            else:
                losses, slope = _rows(logits, labels[part], given.bias, settings, any(wants), second)
            loss += losses.sum()
            totals.add(slope, part)
    return loss, totals.of_all(positions, places)


def _labelled(
    given: HeadInputs, labels: Tensor, ignore_index: int | None
) -> tuple[HeadInputs, Tensor, Tensor | None]:
    """The positions that have a label, their labels, and where they are: None where all have one."""
    kept = None if ignore_index is None else labels != ignore_index
    if kept is None or bool(kept.all()):
        return given, labels, None
    places = kept.nonzero().squeeze(1)
    low = None if given.low is None else given.low[places]
    return given._replace(hidden=given.hidden[places], low=low), labels[places], places


def _rows_in_place(
    logits: Tensor, labels: Tensor, bias: Tensor | None, settings: LossSettings, gradient: bool
) -> Tensor:
    """Loss [c] of each row of logits [c, V], whose gradients take their place."""
    from .kernels.cross_entropy import losses_of_rows

    softcap, smoothing, _ = settings
    losses, _ = losses_of_rows(
        logits, labels, bias=bias, softcap=softcap, smoothing=smoothing, gradient=gradient
    )
    return losses


def _rows(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    settings: LossSettings,
    gradient: bool,
    buffer: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss [c, 1] of each row of logits [c, V], which are used up, and their gradient in `buffer`."""
    softcap, smoothing, _ = settings
    inner = torch.promote_types(logits.dtype, torch.float32)
    capped_(logits, bias, softcap)
    wanted = logits.gather(1, labels[:, None]).to(inner)
    # the largest logit, and its probability: log-sum-exp without a second pass of exponentials
    largest = logits.amax(dim=1, keepdim=True).to(inner)
    probability = torch.softmax(logits, dim=1, out=buffer[: len(labels)])
    losses = largest - probability.amax(dim=1, keepdim=True).to(inner).log_() - wanted
    if smoothing:
        losses += smoothing * (wanted - logits.mean(dim=1, keepdim=True, dtype=inner))
    if not gradient:
        return losses, probability
    slope = probability.sub_(smoothing / logits.shape[1]) if smoothing else probability
    add_at_(slope, labels, slope.new_full((len(labels),), smoothing - 1))
    if softcap is not None:
        slope.mul_(logits.div_(softcap).square_().neg_().add_(1.0))
    return losses, slope


def capped_(products: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits [c, V] of products of positions and weight, in their place."""
    if bias is not None:
        products += bias
    return products if softcap is None else products.div_(softcap).tanh_().mul_(softcap)


def add_at_(rows: Tensor, column: Tensor, value: Tensor) -> None:
    """Add value [c] to rows [c, V], contiguous, a column each.

    In bfloat16 `scatter_add_` takes as long as a product; in float32 it is as quick as this.
    """
    first = torch.arange(len(rows), device=rows.device) * rows.shape[1]
    rows.view(-1).index_add_(0, first + column, value)


class _Totals:
    """Gradients by what the logits are made of, chunk after chunk."""

    def __init__(self, given: HeadInputs, wants: Sequence[bool], inner: torch.dtype) -> None:
        hidden, weight, bias, low, high = given
        self._hidden, self._weight, self._low, self._high = hidden, weight, low, high
        self._wants, self._inner = wants, inner
        # Contiguous whatever the strides are: so a compiled graph has been told.
        rows = torch.contiguous_format
        self._of_hidden = torch.empty_like(hidden, memory_format=rows) if wants[0] else None
        self._of_low = torch.empty_like(low, memory_format=rows) if wants[3] and low is not None else None
        self._of_weight: Tensor | None = None
        self._of_high: Tensor | None = None
        self._of_bias: Tensor | None = None
        if wants[2] and bias is not None:
            self._of_bias = torch.zeros(len(bias), dtype=inner, device=hidden.device)

    def add(self, slope: Tensor, part: slice) -> None:
        """What the positions `part` add; slope [c, V], of which all of them are read."""
        last = part.start == 0 and part.stop == len(self._hidden)
        if self._of_bias is not None:
            self._of_bias += slope.sum(dim=0, dtype=self._inner)
        if self._of_hidden is not None:
            torch.mm(slope, self._weight, out=self._of_hidden[part])
        if self._of_low is not None and self._high is not None:
            torch.mm(slope, self._high, out=self._of_low[part])
        if self._wants[1]:
            self._of_weight = self._added(self._of_weight, slope, self._hidden[part], last)
        if self._wants[4] and self._low is not None:
            self._of_high = self._added(self._of_high, slope, self._low[part], last)

    def _added(self, total: Tensor | None, slope: Tensor, right: Tensor, last: bool) -> Tensor:
        """total + slope^T right in float32; of one chunk alone the product in its own type."""
        if total is None:
            product = slope.t() @ right
            return product if last else product.to(self._inner)
        if total.dtype == slope.dtype:
            return total.addmm_(slope.t(), right)
        if _product_in_float32(total):
            return torch.addmm(total, slope.t(), right, out_dtype=torch.float32, out=total)
        return total.add_(slope.t() @ right)

    def of_all(self, positions: int, places: Tensor | None) -> list[Tensor | None]:
        """The gradients; by hidden and low for all positions, zero where there was no label."""
        per_position = [self._of_hidden, self._of_low]
        if places is not None:
            per_position = [
                None if g is None else g.new_zeros((positions, g.shape[1])).index_copy_(0, places, g)
                for g in per_position
            ]
        of_weight, of_high = self._of_weight, self._of_high
        if self._wants[1] and of_weight is None:
            of_weight = torch.zeros_like(self._weight)
        if self._wants[4] and of_high is None and self._high is not None:
            of_high = torch.zeros_like(self._high)
        return [per_position[0], of_weight, self._of_bias, per_position[1], of_high]


def _product_in_float32(total: Tensor) -> bool:
    """Whether a product of bfloat16 can be added to `total` without being rounded to bfloat16 first."""
    return (
        total.device.type == "cuda"
        and total.dtype == torch.float32
        and torch.version.hip is None
        and torch.cuda.get_device_capability(total.device) >= (8, 0)
    )


def liger_cross_entropy_sum(given: HeadInputs, labels: Tensor, settings: LossSettings) -> Tensor:
    """`cross_entropy_sum` by Liger, which has its own gradients; chunks as large as ours."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    (hidden, weight, bias, _, _), labels, _ = _labelled(given, labels, settings.ignore_index)
    if not len(hidden):
        return hidden.sum() * 0.0 + weight.sum() * 0.0  # nothing, and zero gradients
    count, vocabulary = len(hidden), len(weight)
    rows = rows_of_chunk(vocabulary, hidden.device, weight.requires_grad)
    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias=bias,
        label_smoothing=settings.smoothing,
        reduction="sum",
        softcap=settings.softcap,
        accum_dtype=torch.float32,
        chunk_mem_const=max(1, rows * vocabulary // (count * hidden.shape[1])),
    )
    return loss
