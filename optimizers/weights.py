"""How an update enters the weights: bit by bit through a small buffer, so that nothing of it is lost.

A bfloat16 weight has eight digits; an update below half of the last one changes nothing when it is rounded to
nearest. Three ways out, `weights` in a recipe:

    sr       round up or down at random, in proportion: right on average, no memory (arXiv:2010.06192)
    kahan    remember what rounding took, in bfloat16: 2 bytes a weight (Kahan's compensated sum); what that
             cannot hold either is rounded at random
    master   keep the weights in float32 too: 4 bytes a weight
    plain    round to nearest

Weights of float32 and float64 are changed in place, whatever the mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .moments import State, computing_dtype

Mode = Literal["sr", "kahan", "master", "plain"]
Step = Callable[[Tensor, slice], None]
"""step(target, rows): add the update of these rows (of dimension 1) to `target` [B, rows, n], in place."""

_TILE = 1 << 18
# Rows worth some megabytes stay in the processor's cache while an update goes through them operation by
# operation.
_CPU_ELEMENTS = 1 << 20
_CUDA_ELEMENTS = 1 << 26


class RoundingNoise:
    """Random 16-bit integers for stochastic rounding, a function of (seed, step, tensor, element) alone.

    One tile a step is drawn, on the CPU so that every device and rank has the same; a tensor reads it
    from an offset of its own. So a step needs no random number per weight, which would cost more than the
    update itself.
    """

    def __init__(self) -> None:
        self._key: tuple[int, int, torch.device] | None = None
        self._tile = torch.empty(0)

    def window(
        self, seed: int, step: int, index: int, first: int, count: int, device: torch.device
    ) -> Tensor:
        """int32 [count] in [0, 65536) for elements first .. first + count of tensor `index`."""
        if self._key != (seed, step, device):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)
            tile = torch.randint(0, 1 << 16, (_TILE,), generator=generator, dtype=torch.int32)
            self._tile = tile.to(device).repeat(2)
            self._key = (seed, step, device)
        start = (first + index * 40_503) % _TILE
        if count > _TILE:
            return self._tile[start : start + _TILE].repeat(-(-count // _TILE))[:count]
        return self._tile[start : start + count]


def weight_bytes(elements: int, mode: Mode, dtype: torch.dtype) -> int:
    """Bytes of state that `mode` adds for `elements` weights of `dtype`."""
    if dtype not in (torch.bfloat16, torch.float16):
        return 0
    return elements * {"sr": 0, "plain": 0, "kahan": 2, "master": 4}[mode]


def prepare(state: State, weight: Tensor, mode: Mode) -> None:
    """Put into `state` what `mode` keeps beside the weight."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return
    if mode == "kahan":
        state["compensation"] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    elif mode == "master":
        state["master"] = weight.detach().float().contiguous()


def add_step(
    weights: list[Tensor],
    states: list[State],
    step: Step,
    *,
    keep: float,
    mode: Mode,
    noise: Callable[[int, int, int], Tensor],
) -> None:
    """weights ← keep · weights + step, where all weights [E, m, n] are of one shape and type.

    keep: 1 - rate · weight decay. noise(which, first, count): random integers for that weight's elements.
    """
    shape, dtype = weights[0].shape, weights[0].dtype
    most = _CPU_ELEMENTS if weights[0].device.type == "cpu" else _CUDA_ELEMENTS
    size = max(1, most // (shape[0] * shape[2] * len(weights)))
    in_place = dtype == computing_dtype(dtype)
    if in_place and len(weights) == 1:
        for first in range(0, shape[1], size):
            rows = slice(first, min(first + size, shape[1]))
            target = weights[0][:, rows]
            step(target.mul_(keep) if keep != 1.0 else target, rows)
        return
    for first in range(0, shape[1], size):
        rows = slice(first, min(first + size, shape[1]))
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
            target = torch.cat(parts).float()
        if keep != 1.0 and (in_place or mode != "kahan"):
            target.mul_(keep)
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
                    _dither(rest, [noise(which, *_range(shape, e, rows)) for e in range(shape[0])])
                loss.copy_(rest)
                part.copy_(moved)
        else:
            if mode == "sr" and dtype == torch.bfloat16:
                for which, piece in enumerate(pieces):
                    _dither(piece, [noise(which, *_range(shape, e, rows)) for e in range(shape[0])])
            torch._foreach_copy_(parts, list(pieces))


def _range(shape: torch.Size, e: int, rows: slice) -> tuple[int, int]:
    return (e * shape[1] + rows.start) * shape[2], (rows.stop - rows.start) * shape[2]


def _dither(values: Tensor, noise: list[Tensor]) -> None:
    """Round float32 [E, rows, n] to values that bfloat16 holds exactly, up or down at random.

    Adding 16 random bits below the kept ones carries in proportion to what is cut. Infinity stays; the
    gradient of a NaN never gets here.
    """
    bits = values.view(torch.int32)
    for part, random in zip(bits, noise, strict=True):
        part.add_(random.view(part.shape))
    bits.bitwise_and_(-65536)
