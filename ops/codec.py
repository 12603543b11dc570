"""Numbers in 8 or 4 bits, blockwise: a run of consecutive elements shares a scale, and codes follow a law.

    law            signed (a mean), s = max |x| of the block        unsigned (a mean square), s = max x

    companded      x = s c |c| / 127²       c in -127..127          x = s (c / 255)⁴      c in 1..255
    linear         x = s c / 127            c in -127..127          x = s (c / 255)²      c in 1..255
    dynamic        x = s D[c]               c in 0..255             x = s D[c]            c in 1..255
    four           x = s c |c| / 7²         c in -7..7              x = s (c / 15)⁴       c in 1..15

Blocks are of 256 elements, of 128 for `four`, whose codes lie two in a byte, the first in the low half. The
square laws need no table and no search and are as precise as the table D of arXiv:2110.02861 ("dynamic
exponent"), which is bitsandbytes'. A mean square is linear in its root, since one that is rounded to zero
makes a huge step; for the same reason no code of a mean square is zero.

A mean square moves by a thousandth a step, less than half a code, and would stand still under rounding to
nearest: codes of mean squares are rounded down after adding a `threshold` in [0, 1) that the caller moves
from step to step, which is right on average. Means are rounded to nearest (half to even). One threshold is
for all elements of a step: the average is right over steps, not over the elements of one.

Where a block's scale is zero all of it is zero; what is not finite makes its block NaN.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from .providers import choose

Law = Literal["companded", "linear", "dynamic", "four"]
LAWS: tuple[Law, ...] = ("companded", "linear", "dynamic", "four")
SMALLEST_SCALE = 1.2e-38
"""What a scale is divided by at least: the block of a smaller one is all zeros to float32."""
_GOLDEN = 0.6180339887498949


def block_of(law: Law) -> int:
    """Elements that share one scale."""
    return 128 if law == "four" else 256


def threshold_at(step: int) -> float:
    """Where mean squares are rounded up at `step`: it walks through [0, 1) by the golden ratio."""
    return (step * _GOLDEN) % 1.0


def code_count(elements: int, law: Law) -> int:
    """Bytes of the codes of so many elements."""
    return -(-elements // 2) if law == "four" else elements


def scale_count(elements: int, law: Law) -> int:
    """float32 numbers beside the codes."""
    return -(-elements // block_of(law))


def encode(
    value: Tensor, codes: Tensor, scales: Tensor, law: Law, *, signed: bool, threshold: float = 0.0
) -> None:
    """Write `value` (float32, any shape) into codes (int8 or uint8, flat) and scales (float32, flat).

    The number of elements is value's; the last block may be shorter. threshold: for unsigned values.
    """
    if torch.compiler.is_compiling():
        encode_op(value, codes, scales, law, signed, threshold)
        return
    if choose("codec", value.device, ["triton"]) == "triton":
        from .kernels.codec import encode as launch

        launch(value.contiguous(), codes, scales, law, signed=signed, threshold=threshold)
        return
    elements = value.numel()
    blocks = _blocks(value.reshape(-1).float(), block_of(law))
    largest = (blocks.abs() if signed else blocks).amax(1, keepdim=True)
    share = blocks.mul(largest.clamp(min=SMALLEST_SCALE).reciprocal_())
    code = _code(share, law, signed, threshold).view(-1)[:elements]
    if law == "four":
        code = torch.nn.functional.pad(code, (0, elements % 2)).to(torch.int8)
        pairs = code.view(torch.uint8).bitwise_and(15).view(-1, 2)
        codes.view(-1)[: len(pairs)].view(torch.uint8).copy_(pairs[:, 0] | pairs[:, 1] << 4)
    else:
        codes.view(-1)[:elements].view(torch.int8 if signed else torch.uint8).copy_(code)
    scales.view(-1)[: len(blocks)].copy_(largest.view(-1))


def decode(codes: Tensor, scales: Tensor, elements: int, law: Law, *, signed: bool) -> Tensor:
    """float32 [elements] of what `encode` wrote."""
    if torch.compiler.is_compiling():
        value: Tensor = decode_op(codes, scales, elements, law, signed)
        return value
    if choose("codec", codes.device, ["triton"]) == "triton":
        from .kernels.codec import decode as launch

        return launch(codes, scales, elements, law, signed=signed)
    flat = codes.reshape(-1)[: code_count(elements, law)].view(torch.int8 if signed else torch.uint8)
    if law == "four":
        halves = flat.view(torch.uint8)
        flat = torch.stack([halves & 15, halves >> 4], 1).view(-1)[:elements]
        if signed:
            flat = (flat.view(torch.int8) ^ 8) - 8  # the sign of four bits
    if law == "dynamic":
        table = dynamic_table(signed).to(flat.device)
        blocks = _blocks(table[flat.view(torch.uint8).int()], block_of(law))
    else:
        blocks = _blocks(flat.float(), block_of(law))
        top = _top(law, signed)
        if law == "linear":
            blocks = blocks.mul_(1 / top) if signed else blocks.mul_(1 / top).square_()
        else:
            blocks = blocks.mul(blocks.abs()).mul_(1 / top**2) if signed else _fourth(blocks, top)
    return blocks.mul_(scales.view(-1)[: len(blocks), None]).view(-1)[:elements]


@torch.library.custom_op("shoestring::encode", mutates_args=("codes", "scales"))
def encode_op(value: Tensor, codes: Tensor, scales: Tensor, law: str, signed: bool, threshold: float) -> None:
    """`encode` as an operation that torch.compile keeps whole."""
    encode(value, codes, scales, law, signed=signed, threshold=threshold)  # type: ignore[arg-type]


@torch.library.custom_op("shoestring::decode", mutates_args=())
def decode_op(codes: Tensor, scales: Tensor, elements: int, law: str, signed: bool) -> Tensor:
    """`decode` as an operation that torch.compile keeps whole."""
    return decode(codes, scales, elements, law, signed=signed)  # type: ignore[arg-type]


@decode_op.register_fake
def _(codes: Tensor, scales: Tensor, elements: int, law: str, signed: bool) -> Tensor:
    return codes.new_empty((elements,), dtype=torch.float32)


def dynamic_table(signed: bool) -> Tensor:
    """float32 [256] in [-1, 1] or [0, 1], ascending: the dynamic exponents of arXiv:2110.02861, figure 3."""
    return _dynamic_table(signed)


@cache
def _dynamic_table(signed: bool) -> Tensor:
    # Seven decades; each has twice as many fractions as the one below, in the middle of equal parts of
    # [0.1, 1]; then zero and one.
    positive: list[Tensor] = []
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64, device="cpu")
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    found = torch.cat(positive)
    sides = [-found, found] if signed else [found]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    return torch.cat([*sides, ends]).sort()[0].float()


def _top(law: Law, signed: bool) -> float:
    return (7.0 if signed else 15.0) if law == "four" else (127.0 if signed else 255.0)


def _code(share: Tensor, law: Law, signed: bool, threshold: float) -> Tensor:
    """Codes, as float32 or an integer type, of shares of the block's scale."""
    if law == "dynamic":
        table = dynamic_table(signed).to(share.device)
        if signed:
            # Between two entries the nearer one; at the very middle the lower.
            near = torch.bucketize(share, (table[1:] + table[:-1]) / 2)
            return near.to(torch.uint8).view(torch.int8)
        low = torch.bucketize(share, table[1:-1], right=True)
        part = (share - table[low]) / (table[low + 1] - table[low])
        return (low + (part + threshold).floor_().clamp_(0, 1)).clamp_(1, 255)
    top = _top(law, signed)
    if signed:
        root = share.abs() if law == "linear" else share.abs().sqrt_()
        return torch.copysign(root, share).mul_(top).round_()
    root = share.sqrt_() if law == "linear" else share.sqrt_().sqrt_()
    return root.mul_(top).add_(threshold).floor_().clamp_(1.0, top)


def _fourth(codes: Tensor, top: float) -> Tensor:
    return codes.mul_(1 / top).square_().square_()


def _blocks(flat: Tensor, size: int) -> Tensor:
    rest = flat.numel() % size
    padded = torch.nn.functional.pad(flat, (0, size - rest)) if rest else flat
    return padded.view(-1, size)
