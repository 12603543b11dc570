"""The product of gathered rows (`ops/gathered.py`): rows are found by their index in the product's own loop.

A program makes one tile of dW [out, in], summed over the k rows in float32, so nothing is added by two of
them and the result is the same in every run. The rows of G are read where they lie; a copy of them would be
written and read again, 4 bytes an element of k x out, beside 2 x in FLOPs for the same element.
Neighbouring programs share columns of G and X in the second-level cache: they go down GROUP tiles before
they go on to the next column of tiles.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .case import Case
from .launching import on_device_of


class Tiles(NamedTuple):
    """A tile of the output, rows at a time, and how the compiler lays it out."""

    out: int
    inner: int
    rows: int
    num_warps: int
    num_stages: int


# By capability; timed nowhere yet. Loads that wait for an index take two stages each: 7 and 5 keep four and
# three tiles of each side on their way, in 50 and 149 KB.
TILES = {80: Tiles(128, 128, 32, 8, 7), 90: Tiles(128, 256, 64, 8, 5)}
GROUP = 8


@triton.jit
def gathered_kernel(
    grad, indices, kept, total, chosen, out_width, in_width, grad_stride, kept_stride,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """total [out, in] = sum over i < chosen of grad[indices[i]] times kept[i]."""
    program = tl.program_id(0).to(tl.int64)
    down, across = tl.cdiv(out_width, OUT), tl.cdiv(in_width, IN)
    group = program // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = program % (GROUP * across)
    m = (group * GROUP + inside % height) * OUT + tl.arange(0, OUT)
    n = (inside // height) * IN + tl.arange(0, IN)
    part = tl.arange(0, ROWS)
    sums = tl.zeros((OUT, IN), dtype=tl.float32)
    for start in range(0, chosen, ROWS):
        place = start + part
        there = place < chosen
        row = tl.load(indices + place, mask=there, other=0)
        # G is loaded as its transpose: of a tile that is turned afterwards sm_80 has no loads in advance
        g = tl.load(
            grad + row[None, :] * grad_stride + m[:, None],
            mask=there[None, :] & (m < out_width)[:, None],
            other=0.0,
        )
        x = tl.load(
            kept + place.to(tl.int64)[:, None] * kept_stride + n[None, :],
            mask=there[:, None] & (n < in_width)[None, :],
            other=0.0,
        )
        sums = tl.dot(g, x, sums)
    inner = (m < out_width)[:, None] & (n < in_width)[None, :]
    tl.store(total + m[:, None] * in_width + n[None, :], sums.to(total.dtype.element_ty), mask=inner)


def gathered(grad: Tensor, indices: Tensor, kept: Tensor, total: Tensor) -> None:
    """Write `total` [out, in]; rows of grad and kept are dense, indices and total contiguous."""
    (out_width, in_width), chosen = total.shape, len(indices)
    if not total.numel():
        return
    tiles = _tiles(total.device)
    grid = (triton.cdiv(out_width, tiles.out) * triton.cdiv(in_width, tiles.inner),)
    with on_device_of(total):
        gathered_kernel[grid](
            grad, indices, kept, total, chosen, out_width, in_width, grad.stride(0), kept.stride(0),
            OUT=tiles.out, IN=tiles.inner, ROWS=tiles.rows, GROUP=GROUP,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip


def _tiles(device: torch.device) -> Tiles:
    newest = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
    # What is newer than 9 has less shared memory on some models (12.0): the smaller tile runs on all.
    return TILES[90 if newest else 80]


def _cases() -> list[Case]:
    sizes = ("out_width", "in_width", "grad_stride", "kept_stride")
    cases = []
    for capability, tiles in TILES.items():
        shape = {"OUT": tiles.out, "IN": tiles.inner, "ROWS": tiles.rows, "GROUP": GROUP}
        limits: dict[str, Any] = {
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "max_registers": 255,  # half of them hold the sums
            "max_shared": (163 if capability == 80 else 227) * 1024,
            "dots": True,
            "capabilities": (capability,),
        }
        for kind, into in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16")):
            types = {"grad": f"*{kind}", "indices": "*i64", "kept": f"*{kind}", "total": f"*{into}"}
            types |= {"chosen": "i32", **dict.fromkeys(sizes, "i64")}
            case = Case(f"gathered {kind} into {into} for {capability}", gathered_kernel, types, shape)
            cases.append(replace(case, aligned=sizes, **limits))
    return cases


AOT_CASES = _cases()
