"""Blockwise codes alone (`ops/codec.py`): encode reads 4 bytes an element and writes 1, decode the other way.

A program takes some blocks of one scale each; fewer where a table is searched, which takes registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codec import Law, block_of
from .case import Case
from .launching import on_device_of
from .numbers import LAW_NUMBERS, decoded, encoded, table_of

ROWS = 16
# Of encoding by a table, which is searched in registers.
FEWER_ROWS = 8


@triton.jit
def encode_kernel(
    value, codes, scales, table, elements, threshold,
    LAW: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Codes and scales of `value`, flat."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(value + place, mask=place < elements, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x) if SIGNED else x, 1)
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)  # a maximum passes over NaN
    code = encoded(x, scale[:, None], tl.cast(threshold, tl.float32), table, LAW, SIGNED)
    if LAW == 3:
        low, high = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
        pair = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        high = tl.where(pair * 2 + 1 < elements, high, 0)
        tl.store(codes + pair, ((low & 15) | ((high & 15) << 4)).to(tl.int8), mask=pair * 2 < elements)
    else:
        tl.store(codes + place, code.to(tl.int8), mask=place < elements)
    tl.store(scales + row, scale, mask=row * BLOCK < elements)


@triton.jit
def decode_kernel(
    codes, scales, value, table, elements,
    LAW: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`value`, flat, of codes and scales."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scale = tl.load(scales + row, mask=row * BLOCK < elements, other=0.0)
    if LAW == 3:
        pair = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        both = tl.load(codes + pair, mask=pair * 2 < elements, other=0).to(tl.int32)
        if SIGNED:
            low, high = ((both & 15) ^ 8) - 8, (((both >> 4) & 15) ^ 8) - 8
        else:
            low, high = both & 15, (both >> 4) & 15
        code = tl.reshape(tl.join(low, high), (ROWS, BLOCK))
    else:
        code = tl.load(codes + place, mask=place < elements, other=0).to(tl.int32)
        if not SIGNED:
            code = code & 255
    tl.store(value + place, decoded(code, scale[:, None], table, LAW, SIGNED), mask=place < elements)


def encode(value: Tensor, codes: Tensor, scales: Tensor, law: Law, *, signed: bool, threshold: float) -> None:
    """As `codec.encode`, whose arguments it takes; all contiguous."""
    elements, block = value.numel(), block_of(law)
    rows = FEWER_ROWS if law == "dynamic" else ROWS
    with on_device_of(value):
        encode_kernel[(triton.cdiv(elements, block * rows),)](
            value, codes.view(torch.int8), scales, table_of(law, signed, value.device), elements, threshold,
            LAW=LAW_NUMBERS[law], SIGNED=signed, BLOCK=block, ROWS=rows, num_warps=8,
        )  # fmt: skip


def decode(codes: Tensor, scales: Tensor, elements: int, law: Law, *, signed: bool) -> Tensor:
    """As `codec.decode`."""
    value = torch.empty(elements, dtype=torch.float32, device=codes.device)
    block = block_of(law)
    with on_device_of(value):
        decode_kernel[(triton.cdiv(elements, block * ROWS),)](
            codes.view(torch.int8), scales, value, table_of(law, signed, codes.device), elements,
            LAW=LAW_NUMBERS[law], SIGNED=signed, BLOCK=block, ROWS=ROWS, num_warps=8,
        )  # fmt: skip
    return value


def _cases() -> list[Case]:
    cases = []
    for law, number in LAW_NUMBERS.items():
        for signed in (True, False):
            shape = {"LAW": number, "SIGNED": signed, "BLOCK": block_of(law), "ROWS": ROWS}
            pointers = {"value": "*fp32", "codes": "*i8", "scales": "*fp32", "table": "*fp32"}
            name = f"{law} {'signed' if signed else 'unsigned'}"
            into = {**pointers, "elements": "i64", "threshold": "fp32"}
            fewer = shape | ({"ROWS": FEWER_ROWS} if law == "dynamic" else {})
            cases.append(Case(f"encode {name}", encode_kernel, into, fewer, 8, aligned=("elements",)))
            back = {**pointers, "elements": "i64"}
            wide = law != "four"  # two codes in a byte: a thread's load is half as wide
            cases.append(
                Case(f"decode {name}", decode_kernel, back, shape, 8, aligned=("elements",), wide=wide)
            )
    return cases


AOT_CASES = _cases()
