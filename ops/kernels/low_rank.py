"""The two products of a low-rank step (`ops/low_rank.py`): into the subspace, and back into the weights.

Into it, R = G P: the gradient is read once, as it lies, by tiles of (its larger side) x (its smaller side);
P is small and stays in the second-level cache. The same tiles give the squared norm of each channel. One
column (APOLLO-Mini) is summed without tensor cores; from two on they are used, 16 columns at least, for
columns of zeros cost nothing where memory is the limit. Ranks above 256 read a tile of the gradient again,
from the cache, since the programs of one tile are neighbours. Where a matrix has too few tiles for a GPU, its
smaller side is shared out, and the parts are summed by whoever reads them, in their order.

Back, W = keep W + L Rᵀ: a tile of the product is made in registers and enters the weights from there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .case import Case
from .launching import on_device_of
from .numbers import dithered, noise_at

# Programs that fill a GPU, the same number on each so that sums are the same.
PROGRAMS = 256
MOST_PARTS = 8


@triton.jit
def project_kernel(
    grad, projection, parts, squares, matrices, long, short, rank, per_part,
    grad_matrix, grad_long, grad_short, projection_matrix,
    SQUARES: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """parts [P, B, long, rank], squares [P, B, long]; grad [B, long, short], projection [B, short, rank]."""
    rank_tiles = tl.cdiv(rank, RANK)
    program = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    matrix = tl.program_id(2).to(tl.int64)
    row = (program // rank_tiles) * LONG + tl.arange(0, LONG)
    column = (program % rank_tiles) * RANK + tl.arange(0, RANK)
    inner = part * per_part + tl.arange(0, SHORT)
    last = tl.minimum((part + 1) * per_part, short)
    there, wanted = (row < long)[:, None], (column < rank)[None, :]
    g_at = grad + matrix * grad_matrix + row[:, None] * grad_long + inner[None, :] * grad_short
    p_at = projection + matrix * projection_matrix
    kind = projection.dtype.element_ty
    total = tl.zeros((LONG,), dtype=tl.float32)
    if RANK == 1:
        sums = tl.zeros((LONG,), dtype=tl.float32)
        for start in range(part * per_part, last, SHORT):
            place = start + tl.arange(0, SHORT)
            g = tl.load(g_at, mask=there & (place < last)[None, :], other=0.0).to(tl.float32)
            p = tl.load(p_at + place, mask=place < last, other=0.0).to(tl.float32)
            sums += tl.sum(g * p[None, :], 1)
            if SQUARES:
                total += tl.sum(g * g, 1)
            g_at += SHORT * grad_short
        out = parts + (part * matrices + matrix) * long + row
        tl.store(out, sums, mask=row < long)
    else:
        product = tl.zeros((LONG, RANK), dtype=tl.float32)
        for start in range(part * per_part, last, SHORT):
            place = start + tl.arange(0, SHORT)
            g = tl.load(g_at, mask=there & (place < last)[None, :], other=0.0)
            p = tl.load(
                p_at + place[:, None] * rank + column[None, :],
                mask=(place < last)[:, None] & wanted,
                other=0.0,
            )
            product = tl.dot(g.to(kind), p, product, input_precision=PRECISION)
            if SQUARES:
                wide = g.to(tl.float32)
                total += tl.sum(wide * wide, 1)
            g_at += SHORT * grad_short
        out = parts + ((part * matrices + matrix) * long + row[:, None]) * rank + column[None, :]
        tl.store(out, product, mask=there & wanted)
    if SQUARES:
        first = program % rank_tiles == 0
        tl.store(squares + (part * matrices + matrix) * long + row, total, mask=(row < long) & first)


@triton.jit(do_not_specialize=["key", "start"])
def add_product_kernel(
    weight, left, right, rows, cols, rank, weight_matrix, weight_row, weight_col, decay, key, start,
    NOISE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weight [B, rows, cols] = (1 - decay) weight + left [B, rows, rank] right [B, cols, rank]ᵀ."""
    program = tl.program_id(0).to(tl.int64)
    matrix = tl.program_id(1).to(tl.int64)
    # Down GROUP tiles before the next column of tiles: what neighbours read of both sides stays in the cache.
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(cols, COLS)
    group = program // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = program % (GROUP * across)
    row = ((group * GROUP + inside % height) * ROWS + tl.arange(0, ROWS))[:, None]
    col = (inside // height) * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, INNER)
    left_at = left + (matrix * rows + row) * rank + inner[None, :]
    right_at = right + (matrix * cols + col[None, :]) * rank + inner[:, None]
    product = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for first in range(0, rank, INNER):
        a = tl.load(left_at, mask=(row < rows) & (first + inner < rank)[None, :], other=0.0)
        b = tl.load(right_at, mask=(first + inner < rank)[:, None] & (col < cols)[None, :], other=0.0)
        product = tl.dot(a, b, product, input_precision=PRECISION)
        left_at += INNER
        right_at += INNER
    at = weight + matrix * weight_matrix + row * weight_row + col[None, :] * weight_col
    there = (row < rows) & (col < cols)[None, :]
    old = tl.load(at, mask=there, other=0.0).to(tl.float32)
    value = old - tl.cast(decay, tl.float32) * old + product
    if NOISE:
        value = dithered(value, noise_at(start + (matrix * rows + row) * cols + col[None, :], key))
    tl.store(at, value.to(weight.dtype.element_ty), mask=there)


def project(grad: Tensor, projection: Tensor, *, squares: bool) -> tuple[Tensor, Tensor]:
    """(parts [P, B, l, r], squares [P, B, l] or empty) of grad [B, l, k] and projection [B or 1, k, r]."""
    matrices, long, short = grad.shape
    rank = projection.shape[2]
    projection = projection.contiguous()
    tiles, warps, stages = _tiles(rank, projection.dtype, along=grad.stride(2) == 1)
    programs = triton.cdiv(long, tiles["LONG"]) * triton.cdiv(rank, tiles["RANK"])
    # At least four tiles a part: fewer are over before they are under way.
    most = max(1, min(MOST_PARTS, short // (4 * tiles["SHORT"])))
    per_part = -(-short // min(most, -(-PROGRAMS // max(1, programs * matrices))))
    per_part = -(-per_part // tiles["SHORT"]) * tiles["SHORT"]
    count = triton.cdiv(short, per_part)
    parts = torch.empty(count, matrices, long, rank, dtype=torch.float32, device=grad.device)
    sums = parts.new_empty((count, matrices, long) if squares else 0)
    strides = (grad.stride(0), grad.stride(1), grad.stride(2))
    with on_device_of(grad):
        project_kernel[(programs, count, matrices)](
            grad, projection, parts, sums, matrices, long, short, rank, per_part, *strides,
            projection.stride(0) if len(projection) > 1 else 0,
            SQUARES=squares, PRECISION="ieee", **tiles, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return parts, sums


def add_product(
    weight: Tensor, left: Tensor, right: Tensor, keep: float, noise: tuple[int, int] | None
) -> None:
    """As `low_rank.add_product`, whose arguments it takes."""
    matrices, rows, cols = weight.shape
    rank = left.shape[2]
    tiles, warps = _product_tiles(rank, left.dtype)
    programs = triton.cdiv(rows, tiles["ROWS"]) * triton.cdiv(cols, tiles["COLS"])
    key, start = noise or (0, 0)
    with on_device_of(weight):
        add_product_kernel[(programs, matrices)](
            weight, left.contiguous(), right.contiguous(), rows, cols, rank, *weight.stride(), 1.0 - keep,
            key, start, NOISE=noise is not None, PRECISION="ieee", **tiles, num_warps=warps, num_stages=3,
        )  # fmt: skip


def _tiles(rank: int, dtype: torch.dtype, *, along: bool) -> tuple[dict[str, int], int, int]:
    """(tile, warps, stages); along: the smaller side lies in memory without gaps."""
    if rank == 1:
        return {"LONG": 32 if along else 128, "SHORT": 256 if along else 64, "RANK": 1}, 8, 3
    padded = max(16, triton.next_power_of_2(rank))
    if dtype == torch.float32:  # without tensor cores: three digits are not what was asked for
        return {"LONG": 64, "SHORT": 32, "RANK": min(64, padded)}, 8, 2
    return {"LONG": 64, "SHORT": 64, "RANK": min(256, padded)}, 8 if padded > 64 else 4, 3


def _product_tiles(rank: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    inner = max(16, min(64, triton.next_power_of_2(rank)))
    if dtype == torch.float32:
        return {"ROWS": 64, "COLS": 64, "INNER": min(32, inner), "GROUP": 8}, 8
    return {"ROWS": 128, "COLS": 128, "INNER": inner, "GROUP": 8}, 8


def _cases() -> list[Case]:
    cases = []
    sizes = dict.fromkeys(("matrices", "long", "short", "rank", "per_part"), "i32")
    lengths = ("short", "long", "rank", "per_part", "grad_matrix", "projection_matrix")
    for rank, dtype, along in (
        (1, "bf16", True), (1, "bf16", False), (4, "bf16", True), (256, "bf16", True), (256, "bf16", False),
        (128, "fp32", True),
    ):  # fmt: skip
        tiles, warps, stages = _tiles(rank, torch.float32 if dtype == "fp32" else torch.bfloat16, along=along)
        near, far = ("grad_short", "grad_long") if along else ("grad_long", "grad_short")
        signature = {
            "grad": f"*{dtype}", "projection": f"*{dtype}", "parts": "*fp32", "squares": "*fp32", **sizes,
            "grad_matrix": "i64", "projection_matrix": "i64", far: "i64",
        }  # fmt: skip
        shape = {"SQUARES": True, "PRECISION": "ieee", near: 1, **tiles}
        aligned = (*lengths, far) if rank % 16 == 0 else tuple(x for x in (*lengths, far) if x != "rank")
        cases.append(
            Case(
                f"project rank {rank} {dtype} {'along' if along else 'across'}",
                project_kernel,
                signature,
                shape,
                warps,
                stages,
                aligned,
                max_registers=255,
                max_shared=160 * 1024,
                dots=rank > 1 and dtype != "fp32",
            )
        )
    for weight, dtype, noise in (("bf16", "bf16", True), ("bf16", "bf16", False), ("fp32", "fp32", False)):
        tiles, warps = _product_tiles(128, torch.float32 if dtype == "fp32" else torch.bfloat16)
        signature = {
            "weight": f"*{weight}", "left": f"*{dtype}", "right": f"*{dtype}",
            **dict.fromkeys(("rows", "cols", "rank", "key", "start"), "i32"),
            **dict.fromkeys(("weight_matrix", "weight_row"), "i64"), "decay": "fp32",
        }  # fmt: skip
        shape = {"NOISE": noise, "PRECISION": "ieee", "weight_col": 1, **tiles}
        aligned = ("rows", "cols", "rank", "weight_matrix", "weight_row")
        cases.append(
            Case(
                f"add_product {weight} {'noise' if noise else 'nearest'}",
                add_product_kernel,
                signature,
                shape,
                warps,
                3,
                aligned,
                max_registers=255,
                max_shared=160 * 1024,
                dots=dtype != "fp32",
            )
        )
    return cases


AOT_CASES = _cases()
