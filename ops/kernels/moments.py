"""A moment in a tile of a kernel: read as float32, written as what it is kept in.

A tile is `ROWS` blocks of `BLOCK` elements, each in a warp, from element `first` of the tensor on; `left` of
them are its own. `moment` and `scales` are addresses (int64). Kept as TYPE where LAW is negative, else as the
codes of `ops/codec.py`: decoded and encoded as there, in fewer instructions, for they are most of what a step
computes. Roots and reciprocals are the hardware's (2^-22), which moves a code only where a value lies between
two; a mean square is decoded by its root, so that small factors do not vanish; rounding is an addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..codec import SMALLEST_SCALE
from .numbers import decoded, encoded

_SMALLEST = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _pairs(left, ALIGN: tl.constexpr):
    """Bytes of so many codes of four bits; that `left` is even says that loads may be wide."""
    return (left if ALIGN == 16 else left + 1) // 2


@triton.jit
def codes_at(
    moment, first, row, left,
    LAW: tl.constexpr, SIGNED: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """int32 [ROWS, BLOCK] of codes from element `first` on, zero from element `left` of these."""
    if LAW == 3:
        bytes_at = tl.multiple_of(moment.to(tl.pointer_type(tl.uint8)), ALIGN) + first // 2
        pair = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        both = tl.load(bytes_at + pair, mask=pair < _pairs(left, ALIGN), other=0).to(tl.int32)
        low, high = both & 15, both >> 4
        if SIGNED:
            low, high = (low ^ 8) - 8, (high ^ 8) - 8
        code = tl.reshape(tl.join(low, high), (ROWS, BLOCK))
    else:
        place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        at = moment.to(tl.pointer_type(tl.int8 if SIGNED and LAW != 2 else tl.uint8))
        code = tl.load(tl.multiple_of(at, ALIGN) + first + place, mask=place < left, other=0).to(tl.int32)
    return code


@triton.jit
def read(
    moment, scales, table, first, row, left,
    TYPE: tl.constexpr, LAW: tl.constexpr, SIGNED: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, BLOCK] of a moment from element `first` on; zero from element `left` of these."""
    if LAW < 0:
        place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        at = tl.multiple_of(moment.to(tl.pointer_type(TYPE)), ALIGN) + first
        value = tl.load(at + place, mask=place < left, other=0.0).to(tl.float32)
    else:
        code = codes_at(moment, first, row, left, LAW, SIGNED, ALIGN, BLOCK, ROWS)
        scales_at = scales.to(tl.pointer_type(tl.float32)) + first // BLOCK
        scale = tl.load(scales_at + row, mask=row * BLOCK < left, other=0.0)[:, None]
        if LAW == 2:
            value = decoded(code, scale, table, LAW, SIGNED)
        else:
            c = code.to(tl.float32)
            if LAW != 1:
                c = c * (tl.abs(c) if SIGNED else c)
            top: tl.constexpr = (7.0 if LAW == 3 else 127.0) if SIGNED else (15.0 if LAW == 3 else 255.0)
            unit: tl.constexpr = 1.0 / (top if LAW == 1 else top * top)
            if SIGNED:
                value = c * (scale * unit)
            else:
                root = c * (tl.sqrt(scale) * unit)
                value = root * root
    return value


@triton.jit
def write(
    value, root, moment, scales, table, threshold, first, row, left,
    TYPE: tl.constexpr, LAW: tl.constexpr, SIGNED: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store what `read` gave and the update changed. root: of a value that is unsigned."""
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if LAW < 0:
        at = tl.multiple_of(moment.to(tl.pointer_type(TYPE)), ALIGN) + first
        tl.store(at + place, value.to(TYPE), mask=place < left)
    else:
        # As integers, the bits of numbers that are not negative are in order, with NaN above all.
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if LAW == 2:  # elsewhere what lies outside is zero
            bits = tl.where(place < left, bits, 0)
        largest = tl.max(bits, 1).to(tl.float32, bitcast=True)
        scales_at = scales.to(tl.pointer_type(tl.float32)) + first // BLOCK
        tl.store(scales_at + row, largest, mask=row * BLOCK < left)
        scale = largest[:, None]
        if LAW == 2:
            code = encoded(value, scale, threshold, table, LAW, SIGNED)
        elif SIGNED:
            share = value * (1.0 / tl.maximum(scale, _SMALLEST))
            if LAW != 1:
                sign = share.to(tl.int32, bitcast=True) & -2147483648
                size = tl.sqrt(tl.abs(share)).to(tl.int32, bitcast=True)
                share = (size | sign).to(tl.float32, bitcast=True)
            # 3 · 2^22 added leaves the nearest integer, half to even, in the lowest bits.
            code = (share * (7.0 if LAW == 3 else 127.0) + 12582912.0).to(tl.int32, bitcast=True)
        else:
            share = root * (1.0 / tl.sqrt(tl.maximum(scale, _SMALLEST)))
            if LAW != 1:
                share = tl.sqrt(share)
            top: tl.constexpr = 15.0 if LAW == 3 else 255.0
            code = tl.minimum(tl.maximum(share * top + threshold, 1.0), top + 0.5).to(tl.int32)
        if LAW == 3:
            bytes_at = tl.multiple_of(moment.to(tl.pointer_type(tl.uint8)), ALIGN) + first // 2
            low, high = tl.split(tl.reshape(tl.where(place < left, code, 0), (ROWS, BLOCK // 2, 2)))
            pair = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
            both = ((low & 15) | ((high & 15) << 4)).to(tl.uint8)
            tl.store(bytes_at + pair, both, mask=pair < _pairs(left, ALIGN))
        else:
            at = tl.multiple_of(moment.to(tl.pointer_type(tl.uint8)), ALIGN) + first
            tl.store(at + place, code.to(tl.uint8), mask=place < left)
