"""The passes of a low-rank step that go element by element (`ops/low_rank.py`).

`moments` reads the sketch once, moves both moments, and gives the norms of each channel (APOLLO) or the step
in the subspace (GaLore). `factors` makes of the norms one number a channel, with the limiter of growth: one
program a matrix. `add_scaled` and `columns` read the gradient and write the weights; they get 1 - keep, for
float32 has few numbers just below 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from .case import Case
from .launching import on_device_of
from .numbers import dithered, noise_at

ELEMENTS = 4096  # of a tile; half of it where moments are kept in registers too


@triton.jit
def moments_kernel(
    parts, exp_avg, exp_avg_sq, scaled, raw, direction, grad_scale, count, size, rows, rank,
    rest1, beta2, rest2, eps, factor,
    NORMS: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Moments [rows, rank] of the sum of parts [count, rows, rank]; squared norms, or direction factor N."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rest1, rest2 = tl.cast(rest1, tl.float32), tl.cast(rest2, tl.float32)
    beta2, eps, factor = tl.cast(beta2, tl.float32), tl.cast(eps, tl.float32), tl.cast(factor, tl.float32)
    of_n, of_r = tl.zeros((ROWS,), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, rank, RANK):
        column = first + tl.arange(0, RANK)
        there = (row < rows)[:, None] & (column < rank)[None, :]
        place = row[:, None] * rank + column[None, :]
        at = parts + place
        r = tl.load(at, mask=there, other=0.0)
        for _ in range(1, count):
            at += size
            r += tl.load(at, mask=there, other=0.0)
        if SCALED:
            r *= tl.load(grad_scale).to(tl.float32)
        m = tl.load(exp_avg + place, mask=there, other=0.0)
        v = tl.load(exp_avg_sq + place, mask=there, other=0.0)
        m += rest1 * (r - m)
        v = beta2 * v + rest2 * r * r
        n = m / (tl.sqrt_rn(v) + eps)
        tl.store(exp_avg + place, m, mask=there)
        tl.store(exp_avg_sq + place, v, mask=there)
        if NORMS:
            n = tl.where(there, n, 0.0)
            of_n += tl.sum(n * n, 1)
            of_r += tl.sum(r * r, 1)
        else:
            tl.store(direction + place, (n * factor).to(direction.dtype.element_ty), mask=there)
    if NORMS:
        tl.store(scaled + row, of_n, mask=row < rows)
        tl.store(raw + row, of_r, mask=row < rows)


@triton.jit
def factors_kernel(
    scaled, raw, squares, norm, factors, grad_scale, count, matrices, long, limit, before, rate,
    CHANNEL: tl.constexpr, SCALED: tl.constexpr, LIMIT: tl.constexpr, FIRST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """factors [B, long] or [B] of squared norms [B, long] and squares [count, B, long]; norm [B] moves on."""
    matrix = tl.program_id(0).to(tl.int64)
    rate, before, limit = tl.cast(rate, tl.float32), tl.cast(before, tl.float32), tl.cast(limit, tl.float32)
    if SCALED:
        clip = tl.load(grad_scale).to(tl.float32)
        rate, before = rate * clip, before * clip
    place = tl.arange(0, LONG)
    top, bottom = tl.zeros((LONG,), dtype=tl.float32), tl.zeros((LONG,), dtype=tl.float32)
    moved = tl.zeros((LONG,), dtype=tl.float32)
    for first in range(0, long, LONG):
        there = first + place < long
        a = tl.load(scaled + matrix * long + first + place, mask=there, other=0.0)
        b = tl.load(raw + matrix * long + first + place, mask=there, other=0.0)
        c = tl.zeros((LONG,), dtype=tl.float32)
        for part in range(count):
            at = squares + (part * matrices + matrix) * long + first + place
            c += tl.load(at, mask=there, other=0.0)
        if CHANNEL:
            s = tl.sqrt_rn(a) / (tl.sqrt_rn(b) + 1e-8)
            c = c * s * s
        top += a
        bottom += b
        moved += c
    whole = tl.sqrt_rn(tl.sum(top, 0)) / (tl.sqrt_rn(tl.sum(bottom, 0)) + 1e-8)
    if LIMIT:
        now = tl.sqrt_rn(tl.sum(moved, 0)) * before
        if not CHANNEL:
            now = now * whole
        if not FIRST:
            growth = now / (tl.load(norm + matrix) + 1e-8)
            # what is not a number stays one: it must not pass for a step without growth
            shrink = tl.where(growth <= limit, 1.0, limit / growth)
            now = now * shrink
            rate = rate * shrink
        tl.store(norm + matrix, now)
    if CHANNEL:
        for first in range(0, long, LONG):
            there = first + place < long
            a = tl.load(scaled + matrix * long + first + place, mask=there, other=0.0)
            b = tl.load(raw + matrix * long + first + place, mask=there, other=0.0)
            s = tl.sqrt_rn(a) / (tl.sqrt_rn(b) + 1e-8)
            tl.store(factors + matrix * long + first + place, s * rate, mask=there)
    else:
        tl.store(factors + matrix, whole * rate)


@triton.jit(do_not_specialize=["key", "start"])
def add_scaled_kernel(
    weight, grad, factors, rows, cols, weight_matrix, weight_row, weight_col,
    grad_matrix, grad_row, grad_col, decay, key, start,
    BY: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """weight [B, m, n] = (1 - decay) weight + factor grad; BY 0: a factor a matrix, 1: a row, 2: a column."""
    matrix = tl.program_id(1).to(tl.int64)
    # Along a row before the next: all tiles in one axis of the grid, for the others end at 65,535.
    tile, across = tl.program_id(0), tl.cdiv(cols, COLS)
    row = ((tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = ((tile % across).to(tl.int64) * COLS + tl.arange(0, COLS))[None, :]
    there = (row < rows) & (col < cols)
    if BY == 0:
        factor = tl.load(factors + matrix)
    elif BY == 1:
        factor = tl.load(factors + matrix * rows + row, mask=row < rows, other=0.0)
    else:
        factor = tl.load(factors + matrix * cols + col, mask=col < cols, other=0.0)
    g_at = grad + matrix * grad_matrix + row * grad_row + col * grad_col
    g = tl.load(g_at, mask=there, other=0.0).to(tl.float32)
    at = weight + matrix * weight_matrix + row * weight_row + col * weight_col
    old = tl.load(at, mask=there, other=0.0).to(tl.float32)
    value = old - tl.cast(decay, tl.float32) * old + g * factor
    if NOISE:
        value = dithered(value, noise_at(start + (matrix * rows + row) * cols + col, key))
    tl.store(at, value.to(weight.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["key", "start", "first", "count"])
def columns_kernel(
    weight, grad, exp_avg, exp_avg_sq, rows, cols, first, count, weight_matrix, weight_row, weight_col,
    grad_matrix, grad_row, grad_col, grad_scale, decay, rate, free, rest1, beta2, rest2, eps, correct1,
    correct2, key, start,
    RULE: tl.constexpr, SCALED: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adam on `count` columns from `first` on, round the end; others: RULE 0 nothing, 1 sign, 2 itself."""
    matrix = tl.program_id(1).to(tl.int64)
    # Along a row before the next: all tiles in one axis of the grid, for the others end at 65,535.
    tile, across = tl.program_id(0), tl.cdiv(cols, COLS)
    row = ((tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = ((tile % across).to(tl.int64) * COLS + tl.arange(0, COLS))[None, :]
    there = (row < rows) & (col < cols)
    # Moments lie in the order of the columns: those that went round the end come before the others.
    over = tl.maximum(first + count - cols, 0)
    number = tl.where(col < over, col, col - first + over)
    active = there & ((col < over) | ((col >= first) & (col < first + count)))
    g_at = grad + matrix * grad_matrix + row * grad_row + col * grad_col
    g = tl.load(g_at, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        g *= tl.load(grad_scale).to(tl.float32)
    moment = (matrix * rows + row) * count + number
    m = tl.load(exp_avg + moment, mask=active, other=0.0)
    v = tl.load(exp_avg_sq + moment, mask=active, other=0.0)
    m += tl.cast(rest1, tl.float32) * (g - m)
    v = tl.cast(beta2, tl.float32) * v + tl.cast(rest2, tl.float32) * g * g
    tl.store(exp_avg + moment, m, mask=active)
    tl.store(exp_avg_sq + moment, v, mask=active)
    bottom = tl.sqrt_rn(v) * tl.cast(correct2, tl.float32) + tl.cast(eps, tl.float32)
    step = m / bottom * tl.cast(correct1, tl.float32) * tl.cast(rate, tl.float32)
    if RULE == 1:
        rest = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g)) * tl.cast(free, tl.float32)  # NaN stays
    elif RULE == 2:
        rest = g * tl.cast(free, tl.float32)
    else:
        rest = tl.zeros_like(g)
    at = weight + matrix * weight_matrix + row * weight_row + col * weight_col
    old = tl.load(at, mask=there, other=0.0).to(tl.float32)
    value = old - tl.cast(decay, tl.float32) * old + tl.where(active, step, rest)
    if NOISE:
        value = dithered(value, noise_at(start + (matrix * rows + row) * cols + col, key))
    tl.store(at, value.to(weight.dtype.element_ty), mask=there)


def moments(
    parts: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float], eps: float,
    grad_scale: Tensor | None, direction: Tensor | None = None, factor: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Squared norms [B l] of N and R, of parts [P, B, l, r]; or `direction` [B, l, r] becomes factor N."""
    count, rank = parts.shape[0], parts.shape[-1]
    rows = exp_avg.numel() // max(1, rank)
    sizes = rows if direction is None else 0
    scaled, raw = parts.new_empty(sizes), parts.new_empty(sizes)
    width = min(1024, triton.next_power_of_2(rank))
    tile = {"ROWS": max(1, ELEMENTS // 2 // width), "RANK": width}
    with on_device_of(parts):
        moments_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            parts, exp_avg, exp_avg_sq, scaled, raw, parts if direction is None else direction,
            parts if grad_scale is None else grad_scale, count, rows * rank, rows, rank,
            1 - betas[0], betas[1], 1 - betas[1], eps, factor,
            NORMS=direction is None, SCALED=grad_scale is not None, **tile, num_warps=8,
        )  # fmt: skip
    return scaled, raw


def factors(
    scaled: Tensor, raw: Tensor, squares: Tensor, norm: Tensor, *, per_channel: bool, limit: float | None,
    before: float, first: bool, rate: float, grad_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[B, l], or [B, 1]; squares [P, B, l]; norm [B, 1, 1], contiguous, is changed in place."""
    matrices, long = len(norm), len(raw) // max(1, len(norm))
    count = len(squares) if limit is not None else 0  # what nothing limits has no use for them
    found = scaled.new_empty(matrices, long if per_channel else 1)
    with on_device_of(scaled):
        factors_kernel[(matrices,)](
            scaled, raw, squares, norm, found, found if grad_scale is None else grad_scale,
            count, matrices, long, limit or 0.0, before, rate,
            CHANNEL=per_channel, SCALED=grad_scale is not None, LIMIT=limit is not None, FIRST=first,
            LONG=4096, num_warps=8,
        )  # fmt: skip
    return found


def add_scaled(
    weight: Tensor, grad: Tensor, scale: Tensor, keep: float, noise: tuple[int, int] | None
) -> None:
    """weight [B, m, n] ← keep weight + scale grad; scale [B, m, 1], [B, 1, n] or [B, 1, 1]."""
    matrices, rows, cols = weight.shape
    tile, key, start = _tile(cols), *(noise or (0, 0))
    by = 1 if scale.shape[1] > 1 else 2 if scale.shape[2] > 1 else 0
    grid = (triton.cdiv(cols, tile["COLS"]) * triton.cdiv(rows, tile["ROWS"]), matrices)
    with on_device_of(weight):
        add_scaled_kernel[grid](
            weight, grad, scale.contiguous(), rows, cols, *weight.stride(), *grad.stride(), 1.0 - keep,
            key, start, BY=by, NOISE=noise is not None, **tile, num_warps=8,
        )  # fmt: skip


def columns(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, first: int, *, keep: float,
    rate: float, free: float, rule: int, betas: tuple[float, float], eps: float, step: int,
    noise: tuple[int, int] | None, grad_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """As `low_rank.add_columns`, whose arguments it takes."""
    matrices, rows, cols = weight.shape
    tile, key, start = _tile(cols, ELEMENTS // 2), *(noise or (0, 0))
    correct1, correct2 = 1 / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
    grid = (triton.cdiv(cols, tile["COLS"]) * triton.cdiv(rows, tile["ROWS"]), matrices)
    with on_device_of(weight):
        columns_kernel[grid](
            weight, grad, exp_avg, exp_avg_sq, rows, cols, first, exp_avg.shape[2],
            *weight.stride(), *grad.stride(), grad if grad_scale is None else grad_scale, 1.0 - keep, rate,
            free, 1 - betas[0], betas[1], 1 - betas[1], eps, correct1, correct2, key, start,
            RULE=rule, SCALED=grad_scale is not None, NOISE=noise is not None, **tile, num_warps=8,
        )  # fmt: skip


def _tile(cols: int, elements: int = ELEMENTS) -> dict[str, int]:
    width = max(16, min(512, triton.next_power_of_2(cols)))
    return {"ROWS": elements // width, "COLS": width}


def _cases() -> list[Case]:
    numbers = (
        "rest1", "beta2", "rest2", "eps", "factor", "decay", "rate", "free", "correct1", "correct2", "limit",
        "before",
    )  # fmt: skip
    floats = dict.fromkeys(numbers, "fp32")
    sizes = dict.fromkeys(
        ("count", "size", "rows", "rank", "cols", "first", "matrices", "long", "key", "start"), "i32"
    )
    strides = dict.fromkeys(("weight_matrix", "weight_row", "grad_matrix", "grad_row"), "i64")
    state = dict.fromkeys(
        ("parts", "exp_avg", "exp_avg_sq", "scaled", "raw", "squares", "norm", "factors", "grad_scale"),
        "*fp32",
    )
    one = {"weight_col": 1, "grad_col": 1}
    aligned = ("size", "rows", "cols", "rank", "long", *strides)

    def case(name: str, kernel: object, constexprs: Mapping[str, object], **own: str) -> Case:
        signature = {**floats, **sizes, **strides, **state, **own}
        return Case(name, kernel, signature, constexprs, 8, aligned=aligned)

    moment, factor = {"SCALED": True, "ROWS": 8, "RANK": 256}, {"SCALED": True, "LONG": 4096}
    found = [
        case("moments norms", moments_kernel, {"NORMS": True, **moment}, direction="*fp32"),
        case("moments direction", moments_kernel, {"NORMS": False, **moment}, direction="*bf16"),
        case("factors", factors_kernel, {"CHANNEL": True, "LIMIT": True, "FIRST": False, **factor}),
    ]
    for kind in ("bf16", "fp32"):
        own = {"weight": f"*{kind}", "grad": f"*{kind}"}
        tile = {"NOISE": kind == "bf16", **_tile(4096), **one}
        found += [
            case(f"add_scaled {by} {kind}", add_scaled_kernel, {"BY": by, **tile}, **own) for by in (0, 1, 2)
        ]
        few = {"RULE": 1, "SCALED": True, **tile, **_tile(4096, ELEMENTS // 2)}
        found.append(case(f"columns {kind}", columns_kernel, few, **own))
    return found


AOT_CASES = _cases()
