"""Dropout in front of A whose mask is a hash of a seed and an element's place: made where read, never stored.

    kept[t, k] = c[t, k] >= n - 2^15,   n = round(p 2^16),   scale = 1 / (1 - n / 2^16)

c[t, k], signed 16 bits, is one half of a 32-bit hash of seed and t ceil(K / 2) + k // 2: the low half for
even k. The probability is exact to 2^-17, and the scale is that of the one in use, so the mean is exact. Here
only zeros are put in; the scale goes into LoRA's own scaling, which costs nothing.

The seed is one draw from torch's CPU generator in each forward pass: a run is repeatable, and activation
checkpointing, which restores that generator, computes the same mask again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .rounding import GOLDEN, MIX_1, MIX_2

_CHUNK = 1 << 18  # elements whose hashes are alive at a time


def draw_seed() -> Tensor:
    """A 32-bit number as a tensor on the CPU, so that a compiled graph can hold the draw."""
    return torch.randint(-(2**31), 2**31, ())


def threshold(p: float) -> int:
    """n of the formula, for p in [0, 1)."""
    return min(round(p * 65536), 65535)


def upscale(p: float) -> float:
    """What the kept elements are multiplied by."""
    return 65536 / (65536 - threshold(p))


def masks(
    shape: Sequence[int], p: float, seed: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows of a [T, K], and what is kept there: 1 or 0, integers as wide as `dtype`.

    Integers, since a product of the bits with 0 or 1 is exact, takes NaN to zero, and is eight times as fast
    on a CPU as filling under a boolean mask.
    """
    columns, least = shape[1], threshold(p) - 32768
    pairs = (columns + 1) // 2
    rows = max(1, _CHUNK // max(columns, 1))
    steps = torch.arange(min(rows, shape[0]) * pairs, dtype=torch.int32, device=device).mul_(_signed(GOLDEN))
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        hashes = _mixed(steps[: count * pairs] + _signed(first * pairs * GOLDEN + seed))
        code = hashes.view(torch.int16).view(count, 2 * pairs)[:, :columns]
        kept = torch.empty(count, columns, dtype=_INTEGERS[dtype.itemsize], device=device)
        yield slice(first, first + count), torch.ge(code, least, out=kept)


def zeroed(x: Tensor, p: float, seed: int) -> Tensor:
    """A copy of x [T, K] with zeros where the mask drops. No scale is applied."""
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows, kept in masks(x.shape, p, seed, x.dtype, x.device):
        torch.mul(x[rows].view(kept.dtype), kept, out=result[rows].view(kept.dtype))
    return result


def backward(x: Tensor, dh: Tensor, a: Tensor, dx: Tensor | None, p: float, seed: int) -> Tensor:
    """dA [r, K] of x [T, K], dh [T, r] and A [r, K]; m (dh A) is added to dx [T, K] in place."""
    seen = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows, kept in masks(x.shape, p, seed, x.dtype, x.device):
        torch.mul(x[rows].view(kept.dtype), kept, out=seen[rows].view(kept.dtype))
        if dx is not None:
            through = dh[rows] @ a
            through.view(kept.dtype).mul_(kept)
            dx[rows].add_(through)
    return dh.t() @ seen


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _mixed(x: Tensor) -> Tensor:
    """The mixer of `rounding.noise_tile`, all 32 bits of it, in place."""
    x.bitwise_xor_(_shifted(x, 16)).mul_(_signed(MIX_1))
    x.bitwise_xor_(_shifted(x, 15)).mul_(_signed(MIX_2))
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, places: int) -> Tensor:
    """x >> places without its sign."""
    return x.bitwise_right_shift(places).bitwise_and_((1 << (32 - places)) - 1)


def _signed(word: int) -> int:
    word &= 0xFFFF_FFFF
    return word - (1 << 32) if word >= 1 << 31 else word
