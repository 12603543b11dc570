"""One step of AdamW or Lion on many tensors: moments in 32, 16, 8 or 4 bits, weights perhaps in bfloat16.

    g ← grad · grad_scale
    adamw (arXiv:1711.05101)    m ← m + (1 - β1)(g - m),   v ← β2 v + (1 - β2) g²
                                w ← (1 - η λ) w - η · m / (1 - β1^t) / (√(v / (1 - β2^t)) + ε)
    lion (arXiv:2302.06675)     c = β1 m + (1 - β1) g,   m ← β2 m + (1 - β2) g
                                w ← (1 - η λ) w - η · sign(c)
    direction                   moments as adamw's,   values ← m / (√v + ε): the state of APOLLO and GaLore

Moments are decoded, updated, used in float32 and then encoded (`codec.py`); weights are written as
`writing.py` says. In one pass an element in 8 bits costs 2 bytes of gradient, 4 of weight and 4 of moments,
with their scales 10.06; operation by operation it is ten times that. The kernel reads nothing back
to the host: `grad_scale` (what clipping and loss scaling multiply by) and `skip` (nonzero: nothing changes)
stay on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .adamw import adamw_update, advance
from .codec import Law, block_of, decode, encode, threshold_at
from .providers import Provider, choose
from .step_call import CHANGED, SCHEMA, StepSettings, StepTensors, folded
from .step_check import check_step
from .writing import add_step

# Elements at a time of the reference: what it touches then stays in a core's cache.
_CPU_ELEMENTS = 1 << 17
_CUDA_ELEMENTS = 1 << 26


def quantised_step(tensors: StepTensors, settings: StepSettings) -> None:
    """Advance weights and moments in place; of the rule `direction` the weights become the directions."""
    if torch.compiler.is_compiling():
        quantised_step_op(*tensors, *settings)
        return
    if not tensors.weights:
        return
    provider = choose("quantised_step", tensors.weights[0].device, _offered(tensors, settings))
    if provider == "triton":
        from .kernels.quantised_step import step as run
    elif provider == "native":
        from .native.step import step as run
    else:
        reference(tensors, settings)
        return
    check_step(tensors, settings)
    run(tensors, settings)
    # What PyTorch's operations tell autograd themselves: a graph made before must not go back through this.
    increment_version([t for column in tensors.changed for t in column])


def _offered(tensors: StepTensors, settings: StepSettings) -> list[Provider]:
    weights, grads, first = tensors.weights, tensors.grads or tensors.weights, tensors.first
    narrow = (torch.float32, torch.bfloat16)
    known = (
        weights[0].dtype in (narrow if settings.rule != "direction" else (torch.float32,))
        and grads[0].dtype in narrow
        and (settings.law is not None or first[0].dtype in narrow)
    )
    return ["triton", "native"] if known else []


def reference(tensors: StepTensors, settings: StepSettings) -> None:
    """The same by PyTorch's operations, in runs that a cache holds."""
    if tensors.skip is not None and bool(tensors.skip):
        return
    for i, weight in enumerate(tensors.weights):
        size = _CPU_ELEMENTS if weight.device.type == "cpu" else _CUDA_ELEMENTS
        for start in range(0, weight.numel(), size):
            _step_part(tensors, settings, i, slice(start, min(start + size, weight.numel())))


def _step_part(tensors: StepTensors, settings: StepSettings, i: int, part: slice) -> None:
    """The step of these elements of tensor i."""
    rule, law, betas, eps = settings.rule, settings.law, settings.betas, settings.eps
    weights, grads, first, first_scales, second, second_scales, extra = tensors.columns
    weight = weights[i].view(-1)[part]
    g = grads[i].reshape(-1)[part].to(_computing(weight))
    if tensors.grad_scale is not None:
        g = g * tensors.grad_scale.to(g.dtype)
    m = _read(first[i], first_scales[i : i + 1], part, law, signed=True)
    if rule == "lion":
        c = m.mul(betas[0]).add_(g, alpha=1 - betas[0])
        update = torch.where(c.isnan(), c, c.sign())  # PyTorch's sign of NaN is 0
        m.mul_(betas[1]).add_(g, alpha=1 - betas[1])
    else:
        v = _read(second[i], second_scales[i : i + 1], part, law, signed=False)
        if rule == "direction":
            update = advance(g, m, v, betas, eps, settings.root)
        else:
            update = adamw_update(g, m, v, betas=betas, eps=eps, step=settings.step)
        _write(v, second[i], second_scales[i : i + 1], part, law, settings.step, signed=False)
    _write(m, first[i], first_scales[i : i + 1], part, law, settings.step, signed=True)
    if rule == "direction":
        weight.copy_(update)
        return

    def add(target: Tensor, rows: slice) -> None:
        target.add_(update[rows].view(target.shape), alpha=-settings.lr)

    name = "master" if settings.mode == "master" else "compensation"
    beside = {name: extra[i].view(-1)[part].view(1, -1, 1)} if extra else {}
    noise = [(settings.key, tensors.starts[i] + part.start)]
    keep = 1 - settings.decay
    # Not by C++: this is what it is held to.
    add_step([weight.view(1, -1, 1)], [beside], add, keep=keep, mode=settings.mode, noise=noise, native=False)


def bytes_per_element(weight: int, grad: int, moments: float, extra: int = 0) -> float:
    """What a step reads and writes at least, from bytes of each per element."""
    return 2 * weight + grad + 2 * moments + 2 * extra


def _read(stored: Tensor, scales: list[Tensor], part: slice, law: Law | None, *, signed: bool) -> Tensor:
    flat = stored.view(-1)
    if law is None:
        return flat[part] if stored.dtype in (torch.float32, torch.float64) else flat[part].float()
    block, codes = block_of(law), 2 if law == "four" else 1
    return decode(
        flat[part.start // codes :],
        scales[0][part.start // block :],
        part.stop - part.start,
        law,
        signed=signed,
    )


def _write(
    value: Tensor,
    stored: Tensor,
    scales: list[Tensor],
    part: slice,
    law: Law | None,
    step: int,
    *,
    signed: bool,
) -> None:
    flat = stored.view(-1)
    if law is None:
        if value.data_ptr() != flat[part].data_ptr():
            flat[part].copy_(value)
        return
    block, codes = block_of(law), 2 if law == "four" else 1
    encode(
        value,
        flat[part.start // codes :],
        scales[0][part.start // block :],
        law,
        signed=signed,
        threshold=threshold_at(step),
    )


def _computing(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@torch.library.custom_op("shoestring::quantised_step", mutates_args=CHANGED, schema=SCHEMA)
def quantised_step_op(*flat: Any) -> None:
    """`quantised_step` as an operation that torch.compile keeps whole; `step_call.unfolded` is its order."""
    quantised_step(*folded(flat))
