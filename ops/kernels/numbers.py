"""Numbers in kernels: random bits, rounding, blockwise codes.

Rules for all of them: `tl.program_id` is widened to int64 before it is multiplied (offsets pass 2^31);
bfloat16 is widened right after a load and made in the store alone; scalars that change from step to step are
run-time arguments, cast to float32, so that nothing is compiled again and none of it is float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import rounding
from ..codec import SMALLEST_SCALE, Law, dynamic_table

PERIOD = tl.constexpr(rounding.PERIOD)
_GOLDEN = tl.constexpr(rounding.GOLDEN)
_MIX_1, _MIX_2 = tl.constexpr(rounding.MIX_1), tl.constexpr(rounding.MIX_2)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
# Laws as numbers, for `tl.constexpr` arguments.
COMPANDED, LINEAR, DYNAMIC, FOUR = (tl.constexpr(n) for n in range(4))
LAW_NUMBERS: Mapping[Law, int] = {"companded": 0, "linear": 1, "dynamic": 2, "four": 3}


@triton.jit
def noise_at(place, key):
    """int32 in [0, 65536) for places (int64 or int32, any): `rounding.noise_tile(key)[place % PERIOD]`.

    PERIOD is a power of two, as widths of weights are: in a matrix 4096 wide rows r and r + 64 have the same
    bits at every step. Each element is right on average; sums down a column average less than they might.
    """
    x = (place & (PERIOD - 1)).to(tl.uint32) * _GOLDEN + key.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return ((x ^ (x >> 16)) >> 16).to(tl.int32)


@triton.jit
def dithered(value, noise):
    """float32 rounded to what bfloat16 holds exactly, up or down by `noise`; a NaN stays one."""
    bits = (value.to(tl.int32, bitcast=True) + noise) & -65536
    return tl.where(value != value, value, bits.to(tl.float32, bitcast=True))


@triton.jit
def rounded(x):
    """float32 of less than 2^22 in size, rounded to nearest, half to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def decoded(codes, scale, table, LAW: tl.constexpr, SIGNED: tl.constexpr):
    """float32 of codes (int32: signed ones in their sign, `dynamic` 0..255); scale broadcasts."""
    if LAW == 2:
        value = tl.load(table + (codes & 255))
    elif SIGNED:
        c = codes.to(tl.float32)
        if LAW == 1:
            value = c * (1.0 / 127)
        elif LAW == 3:
            value = c * tl.abs(c) * (1.0 / 49)
        else:
            value = c * tl.abs(c) * (1.0 / 16129)
    else:
        value = codes.to(tl.float32) * ((1.0 / 15) if LAW == 3 else (1.0 / 255))
        value = value * value
        if LAW != 1:
            value = value * value
    return value * scale


@triton.jit
def encoded(value, scale, threshold, table, LAW: tl.constexpr, SIGNED: tl.constexpr):
    """int32 codes of float32 values; scale (max |value| of the block) broadcasts."""
    share = value * (1.0 / tl.maximum(scale, _SMALLEST_SCALE))
    if LAW == 2:
        code = _nearest(share, threshold, table, SIGNED)
    elif SIGNED:
        root = tl.abs(share)
        if LAW != 1:
            root = tl.sqrt_rn(root)
        code = rounded(root * (7.0 if LAW == 3 else 127.0)).to(tl.int32)
        code = tl.where(share < 0, -code, code)
    else:
        root = tl.sqrt_rn(share)
        if LAW != 1:
            root = tl.sqrt_rn(root)
        # cut: what is rounded is not negative
        code = (root * (15.0 if LAW == 3 else 255.0) + threshold).to(tl.int32)
        code = tl.minimum(tl.maximum(code, 1), 15 if LAW == 3 else 255)
    return code


@triton.jit
def _nearest(share, threshold, table, SIGNED: tl.constexpr):
    """Index of the entry of the ascending table [256] that stands for `share`, by halving."""
    low = tl.zeros_like(share).to(tl.int32)
    for step in tl.static_range(8):
        ahead = low + (128 >> step)
        entry = tl.load(table + ahead)
        if SIGNED:
            entry = (entry + tl.load(table + ahead - 1)) / 2  # past the middle it is the upper one
            low = tl.where(share > entry, ahead, low)
        else:
            low = tl.where(share >= entry, ahead, low)
    if not SIGNED:
        low = tl.minimum(low, 254)
        below = tl.load(table + low)
        part = (share - below) / (tl.load(table + low + 1) - below)
        low += tl.minimum(tl.maximum((part + threshold).to(tl.int32), 0), 1)
        low = tl.minimum(tl.maximum(low, 1), 255)
    return low


def table_of(law: Law, signed: bool, device: torch.device) -> Tensor:
    """The table that `decoded` and `encoded` read, on `device`; of laws without one, anything."""
    key = (law == "dynamic", signed, device)
    if key not in _tables:
        table = dynamic_table(signed) if law == "dynamic" else torch.zeros(1, device="cpu")
        _tables[key] = table.to(device, torch.float32)
    return _tables[key]


_tables: dict[tuple[bool, bool, torch.device], Tensor] = {}
