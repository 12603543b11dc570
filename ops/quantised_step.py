"""One step of AdamW or Lion on many tensors: moments in 32, 16, 8 or 4 bits, weights perhaps in bfloat16.

    g ← grad · grad_scale
    adamw (arXiv:1711.05101)    m ← m + (1 - β1)(g - m),   v ← β2 v + (1 - β2) g²
                                w ← (1 - η λ) w - η · m / (1 - β1^t) / (√(v / (1 - β2^t)) + ε)
    lion (arXiv:2302.06675)     c = β1 m + (1 - β1) g,   m ← β2 m + (1 - β2) g
                                w ← (1 - η λ) w - η · sign(c)
    direction                   moments as adamw's,   values ← m / (√v + ε): the state of APOLLO and GaLore

Moments are decoded, updated, used in float32 and then encoded (`codec.py`); weights are written as
`writing.py` says. In one pass an element in 8 bits costs 2 bytes of gradient, 4 of weight and 4 of moments,
with their scales 10.06; operation by operation it is ten times that. Nothing is read back to the host:
`grad_scale` (what clipping and loss scaling multiply by) and `skip` (nonzero: nothing changes) stay on the
device.

What must hold of the tensors of one call: one device; each list of one type, contiguous; of any sizes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .adamw import adamw_update, advance
from .codec import Law, block_of, decode, encode, threshold_at
from .providers import Provider, choose
from .writing import Mode, add_step

Rule = Literal["adamw", "lion"]
# Elements at a time of the reference: what it touches then stays in a core's cache.
_CPU_ELEMENTS = 1 << 17
_CUDA_ELEMENTS = 1 << 26


def quantised_step(
    rule: Rule,
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    first_scales: list[Tensor],
    second: list[Tensor],
    second_scales: list[Tensor],
    extra: list[Tensor],
    *,
    law: Law | None,
    mode: Mode,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    key: int,
    starts: list[int],
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """Advance weights and moments in place; all lists are parallel, and see the module for the rest.

    weights bfloat16 or float32 (float16, float64: PyTorch's operations), grads of any floating type. law:
    of moments that are codes, with their float32 scales; None where they are float32, float64 or bfloat16,
    and the lists of scales are empty. lion has no second moment: empty lists. extra: for narrow weights the
    float32 `master`s or the bfloat16 compensations of `kahan`, else empty. step counts from 1; key and
    starts: `rounding.noise_key` and `noise_start` of each tensor.
    """
    if torch.compiler.is_compiling():
        quantised_step_op(
            rule, weights, grads, first, first_scales, second, second_scales, extra, law or "", mode, lr,
            betas[0], betas[1], eps, weight_decay, step, key, starts, grad_scale, skip,
        )  # fmt: skip
        return
    provider = (
        choose("quantised_step", weights[0].device, _offered(weights, grads, first, law))
        if weights
        else "torch"
    )
    if provider == "triton":
        from .kernels.quantised_step import step as run
    elif provider == "native":
        from .native.step import step as run
    else:
        run = reference
    run(
        rule, weights, grads, first, first_scales, second, second_scales, extra, law=law, mode=mode, lr=lr,
        betas=betas, eps=eps, weight_decay=weight_decay, step=step, key=key, starts=starts,
        grad_scale=grad_scale, skip=skip,
    )  # fmt: skip


def quantised_direction(
    values: list[Tensor],
    first: list[Tensor],
    first_scales: list[Tensor],
    second: list[Tensor],
    second_scales: list[Tensor],
    *,
    law: Law | None,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """values (float32 or float64 gradients) ← m / (√v + ε), after both moments have advanced by them."""
    if torch.compiler.is_compiling():
        quantised_direction_op(
            values, first, first_scales, second, second_scales, law or "", betas[0], betas[1], eps, step
        )
        return
    if not values:
        return
    provider = choose("quantised_step", values[0].device, _offered(values, values, first, law))
    if provider == "triton":
        from .kernels.quantised_step import direction as run
    elif provider == "native":
        from .native.step import direction as run
    else:
        run = reference_direction
    run(values, first, first_scales, second, second_scales, law=law, betas=betas, eps=eps, step=step)


def _offered(
    weights: list[Tensor], grads: list[Tensor], first: list[Tensor], law: Law | None
) -> list[Provider]:
    narrow = (torch.float32, torch.bfloat16)
    known = (
        weights[:1]
        and weights[0].dtype in narrow
        and grads[0].dtype in narrow
        and (law is not None or first[0].dtype in narrow)
    )
    return ["triton", "native"] if known else []


def reference(
    rule: Rule,
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    first_scales: list[Tensor],
    second: list[Tensor],
    second_scales: list[Tensor],
    extra: list[Tensor],
    *,
    law: Law | None,
    mode: Mode,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    key: int,
    starts: list[int],
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """The same by PyTorch's operations, in runs that a cache holds."""
    if skip is not None and bool(skip):
        return
    keep = 1 - lr * weight_decay
    for i, weight in enumerate(weights):
        flat, grad = weight.view(-1), grads[i].reshape(-1)
        kept = {} if not extra else {"master" if mode == "master" else "compensation": extra[i].view(-1)}
        for part in _runs(flat):
            g = grad[part].to(_computing(weight))
            if grad_scale is not None:
                g = g * grad_scale.to(g.dtype)
            m = _read(first[i], first_scales[i : i + 1], part, law, signed=True)
            if rule == "lion":
                update = m.mul(betas[0]).add_(g, alpha=1 - betas[0]).sign_()
                m.mul_(betas[1]).add_(g, alpha=1 - betas[1])
            else:
                v = _read(second[i], second_scales[i : i + 1], part, law, signed=False)
                update = adamw_update(g, m, v, betas=betas, eps=eps, step=step)
                _write(v, second[i], second_scales[i : i + 1], part, law, step, signed=False)
            _write(m, first[i], first_scales[i : i + 1], part, law, step, signed=True)

            def add(target: Tensor, rows: slice, update: Tensor = update) -> None:
                target.add_(update[rows].view(target.shape), alpha=-lr)

            beside = [{name: value[part].view(1, -1, 1) for name, value in kept.items()}]
            noise = [(key, starts[i] + part.start)]
            add_step([flat[part].view(1, -1, 1)], beside, add, keep=keep, mode=mode, noise=noise)


def reference_direction(
    values: list[Tensor],
    first: list[Tensor],
    first_scales: list[Tensor],
    second: list[Tensor],
    second_scales: list[Tensor],
    *,
    law: Law | None,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """`quantised_direction` by PyTorch's operations."""
    for i, value in enumerate(values):
        flat = value.view(-1)
        for part in _runs(flat):
            m = _read(first[i], first_scales[i : i + 1], part, law, signed=True)
            v = _read(second[i], second_scales[i : i + 1], part, law, signed=False)
            flat[part].copy_(advance(flat[part], m, v, betas, eps, 1.0))
            _write(m, first[i], first_scales[i : i + 1], part, law, step, signed=True)
            _write(v, second[i], second_scales[i : i + 1], part, law, step, signed=False)


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


def _runs(flat: Tensor) -> list[slice]:
    size = _CPU_ELEMENTS if flat.device.type == "cpu" else _CUDA_ELEMENTS
    return [slice(at, min(at + size, flat.numel())) for at in range(0, flat.numel(), size)]


def _computing(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@torch.library.custom_op(
    "shoestring::quantised_step",
    mutates_args=("weights", "first", "first_scales", "second", "second_scales", "extra"),
)
def quantised_step_op(
    rule: str,
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    first_scales: list[Tensor],
    second: list[Tensor],
    second_scales: list[Tensor],
    extra: list[Tensor],
    law: str,
    writing: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    key: int,
    starts: list[int],
    grad_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """`quantised_step` as an operation that torch.compile keeps whole; law "" is None, writing its `mode`.

    PyTorch's tracer has a positional argument `mode` of its own, which one of this name would collide with.
    """
    quantised_step(
        rule, weights, grads, first, first_scales, second, second_scales, extra,  # type: ignore[arg-type]
        law=law or None, mode=writing, lr=lr, betas=(beta1, beta2), eps=eps,  # type: ignore[arg-type]
        weight_decay=weight_decay, step=step, key=key, starts=starts, grad_scale=grad_scale, skip=skip,
    )  # fmt: skip


@torch.library.custom_op(
    "shoestring::quantised_direction",
    mutates_args=("values", "first", "first_scales", "second", "second_scales"),
)
def quantised_direction_op(
    values: list[Tensor],
    first: list[Tensor],
    first_scales: list[Tensor],
    second: list[Tensor],
    second_scales: list[Tensor],
    law: str,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """`quantised_direction` as an operation that torch.compile keeps whole; law "" is None."""
    quantised_direction(
        values, first, first_scales, second, second_scales,
        law=law or None, betas=(beta1, beta2), eps=eps, step=step,  # type: ignore[arg-type]
    )  # fmt: skip
