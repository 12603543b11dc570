"""How an update enters the weights: bit by bit through a small buffer, so that nothing of it is lost.

Three ways out of bfloat16's eight digits, and none:

    sr       round up or down at random, in proportion: right on average, no memory (`rounding.py`)
    kahan    remember what rounding took, in bfloat16: 2 bytes a weight (Kahan's compensated sum); what that
             cannot hold either is rounded at random
    master   keep the weights in float32 too: 4 bytes a weight
    plain    round to nearest

Weights of float32 and float64 are changed in place, whatever the mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .providers import choose
from .rounding import Noise, dither_, noise_window

Mode = Literal["sr", "kahan", "master", "plain"]
Step = Callable[[Tensor, slice], None]
"""step(target, rows): add the update of these rows (of dimension 1) to `target` [B, rows, n], in place.

It only adds: `target` holds the weights, what is kept beside them, or nothing yet."""

# Rows worth a megabyte stay in the processor's cache while an update goes through them operation by
# operation.
_CPU_ELEMENTS = 1 << 18
_CUDA_ELEMENTS = 1 << 26


def add_step(
    weights: list[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    step: Step,
    *,
    keep: float,
    mode: Mode,
    noise: Sequence[Noise],
    native: bool = True,
) -> None:
    """weights ← keep · weights + step, where all weights [E, m, n] are of one shape and type.

    keep: 1 - rate · weight decay. states: each with its `master` or `compensation` where the mode has one.
    noise: of each weight; read for bfloat16 weights in the modes sr and kahan alone. native: C++ may do it.
    """
    shape, device = weights[0].shape, weights[0].device
    if not shape.numel():
        return
    most = _CPU_ELEMENTS if device.type == "cpu" else _CUDA_ELEMENTS
    size = max(1, most // (shape[0] * shape[2] * len(weights)))
    runs = [slice(first, min(first + size, shape[1])) for first in range(0, shape[1], size)]
    in_place = weights[0].dtype in (torch.float32, torch.float64)
    if in_place and len(weights) == 1:
        for rows in runs:
            target = weights[0][:, rows]
            step(_decayed(target, keep), rows)
        return
    known = weights[0].dtype == torch.bfloat16 and all(w.is_contiguous() for w in weights)
    if native and choose("writing", device, ["native"] if known else []) == "native":
        from .native.step import write

        for rows in runs:
            size_of = len(weights) * shape[0], rows.stop - rows.start, shape[2]
            target = torch.zeros(size_of, dtype=torch.float32, device=device)
            step(target, rows)
            write(weights, states, target, rows, keep=keep, mode=mode, noise=noise)
        return
    for rows in runs:
        _write(weights, states, step, rows, keep=keep, mode=mode, noise=noise)


def _write(
    weights: list[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    step: Step,
    rows: slice,
    *,
    keep: float,
    mode: Mode,
    noise: Sequence[Noise],
) -> None:
    """`add_step` of these rows, in a copy of the weights or in their masters."""
    shape, dtype = weights[0].shape, weights[0].dtype
    in_place = dtype in (torch.float32, torch.float64)
    parts = [w[:, rows] for w in weights]
    if in_place:
        target = torch.cat(parts)
    elif mode == "master":
        masters = [s["master"].view(shape)[:, rows] for s in states]
        target = masters[0] if len(masters) == 1 else torch.cat(masters)
    elif mode == "kahan":
        lost = [s["compensation"].view(shape)[:, rows] for s in states]
        target = torch.cat(lost).float()
        if keep != 1.0:
            target.add_(torch.cat(parts), alpha=keep - 1.0)
    else:
        target = parts[0].float() if len(parts) == 1 else torch.cat(parts).float()
    if in_place or mode != "kahan":
        _decayed(target, keep)
    step(target, rows)
    pieces = torch.split(target, shape[0])
    if in_place:
        torch._foreach_copy_(parts, list(pieces))
    elif mode == "master":
        if len(parts) > 1:
            torch._foreach_copy_(masters, list(pieces))
        torch._foreach_copy_(parts, list(pieces))
    elif mode == "kahan":
        for which, (part, loss, wanted) in enumerate(zip(parts, lost, pieces, strict=True)):
            moved = part.float().add_(wanted).to(dtype)
            rest = wanted.sub_(moved.float().sub_(part.float()))
            if dtype == torch.bfloat16:
                # To nearest, the same small update would be cut in the same way at every step.
                _dither(rest, noise[which], shape, rows)
            loss.copy_(rest)
            part.copy_(moved)
    else:
        if mode == "sr" and dtype == torch.bfloat16:
            for which, piece in enumerate(pieces):
                _dither(piece, noise[which], shape, rows)
        torch._foreach_copy_(parts, list(pieces))


def _decayed(target: Tensor, keep: float) -> Tensor:
    """`target`, in place, times `keep`, which float32 itself would round to a multiple of 6e-8."""
    return target.add_(target, alpha=keep - 1.0) if keep != 1.0 else target


def _dither(values: Tensor, noise: Noise, shape: torch.Size, rows: slice) -> None:
    """Round these rows of a weight of `shape` at random."""
    for e, part in enumerate(values):
        first, count = (e * shape[1] + rows.start) * shape[2], part.numel()
        dither_(part, noise_window(noise, first, count, values.device))
