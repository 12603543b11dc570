"""Rounding to bfloat16 at random, by numbers that are a hash of their place: none is drawn or stored.

A bfloat16 weight has eight digits; an update below half of the last one changes nothing when it is rounded to
nearest. Rounded up with a probability in proportion to what is cut it is right on average (arXiv:2010.06192):
add 16 random bits below the kept ones, and cut.

The random bits of element i of tensor t at a step are a hash of (seed, step, t, i) alone, so that every
device, rank, chunk, thread and kernel has the same. i enters modulo `PERIOD`: here, where each operation is a
pass over memory, one tile of so many numbers a step serves all tensors, each from an offset of its own; the
kernels compute the same numbers where they need them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PERIOD = 1 << 18
"""Elements after which the random bits of a tensor repeat."""
STRIDE = 40_503
"""Places between the starts of one tensor and the next."""

_MASK = 0xFFFF_FFFF
GOLDEN = 0x9E37_79B1  # 2^32 over the golden ratio: neighbouring places come far apart
MIX_1, MIX_2 = 0x7FEB_352D, 0x846C_A68B  # Wellons' 32-bit mixer "lowbias32", found by search


def noise_key(seed: int, step: int) -> int:
    """The 32 bits that (seed, step) enter the hash with, as a signed number."""
    key = ((seed * 1_000_003 + step) * 0x9E37_79B9_7F4A_7C15) & 0xFFFF_FFFF_FFFF_FFFF
    return _signed((key ^ (key >> 29)) >> 16)


def noise_start(index: int, first: int = 0) -> int:
    """The place of element `first` of tensor `index`."""
    return (first + index * STRIDE) % PERIOD


def noise_tile(key: int) -> Tensor:
    """int32 [PERIOD] in [0, 65536): the random bits of all places."""
    x = torch.arange(PERIOD, dtype=torch.int32, device="cpu").mul_(_signed(GOLDEN)).add_(key)
    x.bitwise_xor_(_shifted(x, 16)).mul_(_signed(MIX_1))
    x.bitwise_xor_(_shifted(x, 15)).mul_(_signed(MIX_2))
    return _shifted(x.bitwise_xor_(_shifted(x, 16)), 16)


Noise = tuple[int, int]
"""Where the random bits of a tensor are: `noise_key` of its step and `noise_start` of its first element."""


def noise_window(noise: Noise, first: int, count: int, device: torch.device) -> Tensor:
    """int32 [count] in [0, 65536) for the elements first .. first + count of a tensor, to be read only."""
    tile = _twice(noise[0], device)
    start = (noise[1] + first) % PERIOD
    if count > PERIOD:
        return tile[start : start + PERIOD].repeat(-(-count // PERIOD))[:count]
    return tile[start : start + count]


@lru_cache(maxsize=2)
def _twice(key: int, device: torch.device) -> Tensor:
    """The tile of a step, which all tensors read, one after the other: a window never has a seam."""
    return noise_tile(key).to(device).repeat(2)


def dither_(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 in place to values that bfloat16 holds exactly, up or down by `noise` (int32, its shape).

    Infinity stays. A NaN whose payload would be carried away comes out as the canonical NaN.
    """
    # On a CPU `isnan` costs several times the rounding, a sum in the cache little: NaN where anything is.
    checked = values.device.type != "cpu" or not bool(values.sum().isfinite())
    nan = values.isnan() if checked else None
    bits = values.view(torch.int32)
    bits.add_(noise.view(bits.shape)).bitwise_and_(-65536)
    return values if nan is None else values.masked_fill_(nan, float("nan"))


def _shifted(x: Tensor, places: int) -> Tensor:
    """x >> places without its sign."""
    return x.bitwise_right_shift(places).bitwise_and_((1 << (32 - places)) - 1)


def _signed(word: int) -> int:
    word &= _MASK
    return word - (1 << 32) if word >= 1 << 31 else word
