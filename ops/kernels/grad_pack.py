"""The pass over gradients (`ops/grad_pack.py`): reads each once, and writes the packed copy.

One launch takes all tensors of one type. A program takes one block of one tensor, whose address stands in a
table; it writes two numbers of its own, so that no sum depends on which program comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grad_pack import BLOCK, KINDS, table_of
from .case import Case
from .launching import on_device_of

TILE = 2048
WARPS = 8
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _swept(
    source, to, left, factor,
    COPY: tl.constexpr, SCALED: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum of squares, largest (NaN where one is) of a block; CUT: it may have fewer than BLOCK elements."""
    lane = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    top = tl.zeros((TILE,), tl.int32)
    for tile in tl.static_range(BLOCK // TILE):
        at, into = source + tile * TILE, to + tile * TILE
        if CUT:
            inside = lane + tile * TILE < left
            x = tl.load(at + lane, mask=inside, other=0.0).to(tl.float32)
        else:
            x = tl.load(at + lane).to(tl.float32)
        if SCALED:
            x = x * factor
            if CUT:
                x = tl.where(inside, x, 0.0)  # zero times an infinite factor
        total += x * x
        # As integers sizes are in the same order, and NaN stands above infinity.
        top = tl.maximum(top, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        if COPY:
            if CUT:
                tl.store(into + lane, x, mask=inside)
            else:
                tl.store(into + lane, x)
    return tl.sum(total, 0), tl.max(top, 0)


@triton.jit(do_not_specialize=["tensors", "first"])
def pack_kernel(
    table, owner, sums, tops, target, scale, tensors, first,
    SOURCE: tl.constexpr, COPY: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """sums, tops [blocks] of the blocks from `first` on; SOURCE: what the addresses point to."""
    block = tl.program_id(0).to(tl.int64) + first
    row = table + tl.load(owner + block)
    start = (block - tl.load(row + 3 * tensors)) * BLOCK
    left = tl.load(row + tensors) - start
    to = target + tl.load(row + 2 * tensors) + start
    address = tl.load(row)
    if SOURCE == 0:
        source = tl.cast(address, tl.pointer_type(tl.float32)) + start
    elif SOURCE == 1:
        source = tl.cast(address, tl.pointer_type(tl.bfloat16)) + start
    else:
        source = tl.cast(address, tl.pointer_type(tl.float16)) + start
    if ALIGNED:
        # Here, where addresses are: of a sum with a constant, which may be nought, the compiler forgets it.
        source, to = tl.multiple_of(source, 16), tl.multiple_of(to, 16)
    factor = tl.load(scale).to(tl.float32) if SCALED else 1.0
    # The mask of a block's end would forbid wide loads in all of them.
    if left >= BLOCK:
        total, top = _swept(source, to, left, factor, COPY, SCALED, False, BLOCK, TILE)
    else:
        total, top = _swept(source, to, left, factor, COPY, SCALED, True, BLOCK, TILE)
    tl.store(sums + block, total)
    tl.store(tops + block, top.to(tl.float32, bitcast=True))


def pack(flat: Sequence[Tensor], target: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 [blocks]: sums of squares and largest of each block of tensors without holes."""
    table = table_of(flat, target)
    sums, tops = torch.empty(2, len(table.owner), dtype=torch.float32, device=table.owner.device)
    with on_device_of(sums):
        for dtype, aligned, first, blocks in table.runs:
            pack_kernel[(blocks,)](
                table.rows, table.owner, sums, tops, sums if target is None else target,
                sums if scale is None else scale, table.rows.shape[1], first,
                SOURCE=KINDS[dtype], COPY=target is not None, SCALED=scale is not None, ALIGNED=aligned,
                BLOCK=BLOCK, TILE=TILE, num_warps=WARPS,
            )  # fmt: skip
    return sums, tops


def _case(source: torch.dtype, target: torch.dtype | None, scaled: bool, aligned: bool) -> Case:
    pointers = {
        "table": "*i64", "owner": "*i32", "sums": "*fp32", "tops": "*fp32",
        "target": f"*{_NAMES[target or torch.float32]}", "scale": "*fp32", "tensors": "i64", "first": "i64",
    }  # fmt: skip
    shape = {
        "SOURCE": KINDS[source], "COPY": target is not None, "SCALED": scaled, "ALIGNED": aligned,
        "BLOCK": BLOCK, "TILE": TILE,
    }  # fmt: skip
    name = f"pack {_NAMES[source]} to {_NAMES[target] if target else 'nothing'}" + ", unaligned" * (
        not aligned
    )
    return Case(
        name, pack_kernel, pointers, shape, WARPS, unaligned=("scale",), max_registers=128, wide=aligned
    )


AOT_CASES = [
    *(_case(dtype, None, False, True) for dtype in _NAMES),
    *(_case(dtype, torch.bfloat16, True, True) for dtype in _NAMES),
    _case(torch.float32, torch.float32, False, True),
    _case(torch.bfloat16, torch.bfloat16, True, False),
]
