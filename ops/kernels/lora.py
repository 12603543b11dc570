"""Where LoRA's skinny products move fewer bytes than cuBLAS can: with dropout, and in what reads g.

With T tokens, K inputs, N outputs and rank r in bf16, bytes beside W's own product and the small h and dh:

    kernel           computes                              here                    by addmm
    down             h = (m x) A^T                         2TK                     6TK and the mask's passes
    up_backward      dh = s g B, dB = s g^T h              2TN + P                 4TN
    down_backward    dx += m (dh A), dA = dh^T (m x)       6TK + 8rKT/2048         14TK and the mask's passes

P = 8rTN (1/512 + 1/512) are the partial sums of both results, written and read: at rank 16 half a TN, so 2.5
against 4. Higher ranks gain little and hold too many registers: for them two passes by cuBLAS. Without
dropout `down` and `down_backward` would move what addmm does, and so would y += s h B^T (4TN) unless it owned
W's product: for those cuBLAS is used.

The mask is `lora_dropout`'s, computed where x and dx are read. Sums over programs are written apart and added
in a fixed order: every result is repeatable.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import rounding
from ..lora import UP_COLUMNS, UP_ROWS
from ..lora_dropout import threshold
from .case import Case
from .launching import on_device_of

_GOLDEN = tl.constexpr(rounding.GOLDEN)
_MIX_1, _MIX_2 = tl.constexpr(rounding.MIX_1), tl.constexpr(rounding.MIX_2)
DOWN_ROWS = 2048  # of x that one program of `down_backward` adds up


@triton.jit
def kept_at(row, pair, pairs, seed, least):
    """Whether dropout keeps the elements of `row` [T, 1] and columns 2 pair, 2 pair + 1 of `pair` [1, K / 2].

    Boolean [T, K], as `lora_dropout.masks` has it. In 32 bits that wrap around: the hash takes no more.
    """
    x = row.to(tl.uint32) * pairs.to(tl.uint32) + pair.to(tl.uint32)
    x = x * _GOLDEN + seed.to(tl.uint32)
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    x = (x ^ (x >> 16)).to(tl.int32, bitcast=True)
    # the shift to the right brings the sign of each half along
    kept = tl.join((x << 16) >> 16 >= least, x >> 16 >= least)
    return tl.reshape(kept, (row.shape[0], 2 * pair.shape[1]))


@triton.jit(do_not_specialize=["seed", "least"])
def down_kernel(
    x, a, h, rows, columns, rank, x_stride, seed, least,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h [rows, rank] of x [rows, columns] and a [rank, columns]; a program takes BLOCK_T rows."""
    seed, pairs = tl.cast(seed, tl.int32), tl.cast((columns + 1) // 2, tl.int32)
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, RANK)
    total = tl.zeros((BLOCK_T, RANK), tl.float32)
    for first in range(0, columns, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        pair = first // 2 + tl.arange(0, BLOCK_K // 2)
        kept = kept_at(row[:, None], pair[None, :], pairs, seed, least)
        seen = tl.where(kept, value.to(tl.float32), 0.0).to(x.dtype.element_ty)
        factor = tl.load(
            a + r[:, None] * columns + column[None, :],
            mask=(r < rank)[:, None] & (column < columns)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(seen, tl.trans(factor), total, input_precision=PRECISION)
    target = h + row[:, None] * rank + r[None, :]
    tl.store(target, total.to(h.dtype.element_ty), mask=(row < rows)[:, None] & (r < rank)[None, :])


@triton.jit
def up_backward_kernel(
    g, b, h, dh_parts, db_parts, rows, columns, rank, g_stride, h_stride, scale,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of dh [programs over columns, rows, rank] and db [programs over rows, columns, rank].

    A program reads ROWS x BLOCK_N of g once: each tile of BLOCK_T rows gives its part of dh, and is added to
    the part of db that stays in registers.
    """
    scale = tl.cast(scale, tl.float32)
    over_rows, over_columns = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = over_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    factor_mask = (column < columns)[:, None] & (r < rank)[None, :]
    factor = tl.load(b + column[:, None] * rank + r[None, :], mask=factor_mask, other=0.0)
    total = tl.zeros((BLOCK_N, RANK), tl.float32)
    for first in range(0, tl.minimum(rows - over_rows * ROWS, ROWS).to(tl.int32), BLOCK_T):
        row = over_rows * ROWS + first + tl.arange(0, BLOCK_T)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        grad = tl.load(g + row[:, None] * g_stride + column[None, :], mask=inside, other=0.0)
        skinny = (row < rows)[:, None] & (r < rank)[None, :]
        part = tl.dot(grad, factor, input_precision=PRECISION)
        target = dh_parts + (over_columns * rows + row)[:, None] * rank + r[None, :]
        tl.store(target, part * scale, mask=skinny)
        seen = tl.load(h + row[:, None] * h_stride + r[None, :], mask=skinny, other=0.0)
        total = tl.dot(tl.trans(grad), seen, total, input_precision=PRECISION)
    target = db_parts + (over_rows * columns + column)[:, None] * rank + r[None, :]
    tl.store(target, total * scale, mask=factor_mask)


@triton.jit(do_not_specialize=["seed", "least"])
def down_backward_kernel(
    x, dh, a, dx, da_parts, rows, columns, rank, x_stride, seed, least,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
    WANTS_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [rows, columns] in place, and partial sums of da [programs over rows, rank, columns]."""
    seed, pairs = tl.cast(seed, tl.int32), tl.cast((columns + 1) // 2, tl.int32)
    over_rows, over_columns = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = over_columns * BLOCK_K + tl.arange(0, BLOCK_K)
    pair = over_columns * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    r = tl.arange(0, RANK)
    factor_mask = (r < rank)[:, None] & (column < columns)[None, :]
    factor = tl.load(a + r[:, None] * columns + column[None, :], mask=factor_mask, other=0.0)
    total = tl.zeros((RANK, BLOCK_K), tl.float32)
    for first in range(0, tl.minimum(rows - over_rows * ROWS, ROWS).to(tl.int32), BLOCK_T):
        row = over_rows * ROWS + first + tl.arange(0, BLOCK_T)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = row[:, None] * columns + column[None, :]
        kept = kept_at(row[:, None], pair[None, :], pairs, seed, least)
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        seen = tl.where(kept, value.to(tl.float32), 0.0).to(x.dtype.element_ty)
        skinny = (row < rows)[:, None] & (r < rank)[None, :]
        grad = tl.load(dh + row[:, None] * rank + r[None, :], mask=skinny, other=0.0)
        total = tl.dot(tl.trans(grad), seen, total, input_precision=PRECISION)
        if WANTS_X:
            old = tl.load(dx + place, mask=inside, other=0.0).to(tl.float32)
            through = tl.dot(grad, factor, input_precision=PRECISION)
            new = old + tl.where(kept, through, 0.0)
            tl.store(dx + place, new.to(dx.dtype.element_ty), mask=inside)
    target = da_parts + (over_rows * rank + r)[:, None] * columns + column[None, :]
    tl.store(target, total, mask=factor_mask)


def down(x: Tensor, a: Tensor, dropout: float, seed: int) -> Tensor:
    """h [T, r] of x [T, in] and A [r, in], one type: (m x) A^T without dropout's scale."""
    x, a = _dense_rows(x), a.contiguous()
    (rows, columns), rank = x.shape, a.shape[0]
    h = x.new_empty(rows, rank)
    if h.numel():
        with on_device_of(x):
            down_kernel[(triton.cdiv(rows, _DOWN["BLOCK_T"]),)](
                x, a, h, rows, columns, rank, x.stride(0), seed, threshold(dropout) - 32768,
                **_DOWN, RANK=_padded(rank), PRECISION=_precision(x), num_warps=4, num_stages=3,
            )  # fmt: skip
    return h


def up_backward(grad: Tensor, b: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dh [T, r] in grad's type and dB [out, r] in float32, of grad [T, out], B [out, r] and h [T, r]."""
    grad, b, h = _dense_rows(grad), b.contiguous(), _dense_rows(h)
    (rows, columns), rank = grad.shape, b.shape[1]
    over = triton.cdiv(rows, UP_ROWS), triton.cdiv(columns, UP_COLUMNS)
    dh = torch.empty(over[1], rows, rank, dtype=torch.float32, device=grad.device)
    db = torch.empty(over[0], columns, rank, dtype=torch.float32, device=grad.device)
    if rows and columns:
        with on_device_of(grad):
            up_backward_kernel[over](
                grad, b, h, dh, db, rows, columns, rank, grad.stride(0), h.stride(0), scale,
                ROWS=UP_ROWS, **_UP_BACK, RANK=_padded(rank), PRECISION=_precision(grad),
                num_warps=8, num_stages=2,
            )  # fmt: skip
    return dh.sum(0).to(grad.dtype), db.sum(0)


def down_backward(x: Tensor, dh: Tensor, a: Tensor, dx: Tensor | None, dropout: float, seed: int) -> Tensor:
    """dA [r, in] in float32 of x [T, in], dh [T, r] and A [r, in]; m (dh A) is added to dx in place."""
    x, dh, a = _dense_rows(x), dh.contiguous(), a.contiguous()
    (rows, columns), rank = x.shape, a.shape[0]
    if dx is not None and not dx.is_contiguous():
        raise ValueError("the gradient of x is added to in place, and must be contiguous")
    over = triton.cdiv(rows, DOWN_ROWS), triton.cdiv(columns, _down_back(rank)["BLOCK_K"])
    da = torch.empty(over[0], rank, columns, dtype=torch.float32, device=x.device)
    if rows and columns:
        with on_device_of(x):
            down_backward_kernel[over](
                x, dh, a, x if dx is None else dx, da, rows, columns, rank, x.stride(0), seed,
                threshold(dropout) - 32768, ROWS=DOWN_ROWS, **_down_back(rank), RANK=_padded(rank),
                WANTS_X=dx is not None, PRECISION=_precision(x), num_warps=8, num_stages=2,
            )  # fmt: skip
    return da.sum(0)


_DOWN: dict[str, Any] = {"BLOCK_T": 64, "BLOCK_K": 64}
_UP_BACK: dict[str, Any] = {"BLOCK_T": 32, "BLOCK_N": UP_COLUMNS}


def _down_back(rank: int) -> dict[str, Any]:
    return {"BLOCK_T": 32, "BLOCK_K": 128 if rank <= 16 else 64}


def _dense_rows(x: Tensor) -> Tensor:
    """x, or a copy where its rows are not dense: transposed, or an expanded gradient."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _cases() -> list[Case]:
    cases = []
    sizes = dict.fromkeys(
        ("rows", "columns", "rank", "x_stride", "g_stride", "h_stride", "seed", "least"), "i32"
    )
    pointers = dict.fromkeys(("x", "a", "h", "g", "b", "dh", "dx"), "*bf16")
    signature = (
        pointers | sizes | {"scale": "fp32"} | dict.fromkeys(("dh_parts", "db_parts", "da_parts"), "*fp32")
    )
    aligned = ("columns", "rank", "x_stride", "g_stride", "h_stride")
    for rank in (16, 32, 64):
        shape: dict[str, Any] = {"RANK": rank, "PRECISION": "tf32"}
        back = {"ROWS": DOWN_ROWS, "WANTS_X": True, **_down_back(rank), **shape}
        most = 168 if rank == 64 else 128
        found = [
            ("down", down_kernel, _DOWN | shape, 4, 3),
            ("down backward", down_backward_kernel, back, 8, 2),
            ("up backward", up_backward_kernel, {"ROWS": UP_ROWS, **_UP_BACK, **shape}, 8, 2),
        ]
        for name, kernel, constants, warps, stages in found[: 3 if rank == 16 else 2]:
            taken = {key: kind for key, kind in signature.items() if key in kernel.arg_names}
            cases.append(
                Case(
                    f"lora {name} rank {rank}", kernel, taken, constants, warps, stages,
                    tuple(key for key in aligned if key in taken), max_registers=most, dots=True,
                )
            )  # fmt: skip
    return cases


AOT_CASES = _cases()
