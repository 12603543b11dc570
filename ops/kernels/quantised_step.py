"""Optimizer steps over many tensors in one launch: moments read, advanced, written back; weights moved.

The formulas are those of `ops/quantised_step.py`. Each element is read once and written once, and the
direction uses the moments in float32, before they are encoded again.

A table on the device has a row of addresses for each tensor. A program looks up which tensor is its own and
goes through up to `CHUNKS` tiles of it. Programs, tiles and launches leave no trace in the result: random
bits and scales depend on an element's place in its own tensor alone.

At 10 bytes an element and 4.3 TB/s an H200 has time for some 70 instructions an element; the loop has 65 with
8-bit moments and rounding at random (130 if roots and quotients were rounded exactly).

Tensors that begin at multiples of 16 bytes and have a multiple of 16 elements go by 128 bits a load; the
others by a launch of their own, element by element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codec import block_of, threshold_at
from ..kept import Kept, sent, stream_of
from ..rounding import PERIOD as _PERIOD
from ..step_call import StepSettings, StepTensors
from .case import Case
from .launching import on_device_of
from .moments import read, write
from .numbers import LAW_NUMBERS, dithered, noise_at, table_of

TILE, CHUNKS, WARPS = 2048, 4, 8
PERIOD = tl.constexpr(_PERIOD)
# Of a tensor the table has: seven addresses, the elements, the place of the first one's random bits, and the
# first program.
COLUMNS = tl.constexpr(10)
RULES = {"adamw": 0, "lion": 1, "direction": 2}
MODES = {"plain": 0, "sr": 1, "kahan": 2, "master": 3}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["key"])
def step_kernel(
    tensors, owners, grad_scale, skip, signed_table, unsigned_table,
    rate, decay, gain_1, keep_2, gain_2, correction, eps, threshold, key,
    RULE: tl.constexpr, MODE: tl.constexpr, WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
    LAW: tl.constexpr, SCALED: tl.constexpr, SKIPS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A step of all tensors of the table. ALIGN: what addresses and sizes are multiples of, 16 or 1."""
    if SKIPS:  # noqa: SIM102 (`and` would load it always)
        if tl.load(skip) != 0:
            return
    program = tl.program_id(0).to(tl.int64)
    mine = tensors + tl.load(owners + program).to(tl.int64) * COLUMNS
    weights = tl.multiple_of(tl.load(mine).to(tl.pointer_type(WEIGHT)), ALIGN)
    grads = tl.multiple_of(tl.load(mine + 1).to(tl.pointer_type(GRAD)), ALIGN)
    first_at, first_scales = tl.load(mine + 2), tl.load(mine + 3)
    second_at, second_scales = tl.load(mine + 4), tl.load(mine + 5)
    extra = tl.multiple_of(tl.load(mine + 6).to(tl.pointer_type(tl.float32 if MODE == 3 else WEIGHT)), ALIGN)
    size, start = tl.multiple_of(tl.load(mine + 7), ALIGN), tl.load(mine + 8)
    factor = tl.load(grad_scale).to(tl.float32) if SCALED else 1.0
    rate, decay, gain_1 = tl.cast(rate, tl.float32), tl.cast(decay, tl.float32), tl.cast(gain_1, tl.float32)
    keep_2, gain_2 = tl.cast(keep_2, tl.float32), tl.cast(gain_2, tl.float32)
    correction, eps = tl.cast(correction, tl.float32), tl.cast(eps, tl.float32)
    threshold = tl.cast(threshold, tl.float32)

    TILE: tl.constexpr = ROWS * BLOCK
    row = tl.arange(0, ROWS)
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = (program - tl.load(mine + 9)) * (TILE * CHUNKS)
    for _ in range(tl.minimum(tl.cdiv(size - first, TILE), CHUNKS).to(tl.int32)):
        left = tl.minimum(size - first, TILE).to(tl.int32)
        inside = place < left
        # All loads stand before the stores, which they could not be moved across.
        g = tl.load(grads + first + place, mask=inside, other=0.0).to(tl.float32)
        m = read(first_at, first_scales, signed_table, first, row, left,
                 MOMENT, LAW, True, ALIGN, BLOCK, ROWS)  # fmt: skip
        if RULE != 1:
            v = read(second_at, second_scales, unsigned_table, first, row, left,
                     MOMENT, LAW, False, ALIGN, BLOCK, ROWS)  # fmt: skip
        if RULE != 2 and MODE != 3:
            w = tl.load(weights + first + place, mask=inside, other=0.0).to(tl.float32)
        if MODE >= 2:
            kept = tl.load(extra + first + place, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            g = g * factor
        if RULE == 1:
            c = m + gain_1 * (g - m)
            update = -rate * tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))
            m = m + gain_2 * (g - m)
        else:
            m = m + gain_1 * (g - m)
            v = keep_2 * v + gain_2 * (g * g)
            root = tl.sqrt(v)
            inverse = tl.rsqrt(root * correction + eps)
            update = -rate * m * (inverse * inverse)
            write(v, root, second_at, second_scales, unsigned_table, threshold, first, row, left,
                  MOMENT, LAW, False, ALIGN, BLOCK, ROWS)  # fmt: skip
        write(m, m, first_at, first_scales, signed_table, threshold, first, row, left,
              MOMENT, LAW, True, ALIGN, BLOCK, ROWS)  # fmt: skip
        if RULE == 2:
            moved = update
        elif MODE == 3:
            moved = kept - decay * kept + update
            tl.store(extra + first + place, moved, mask=inside)
        elif MODE == 2:
            wanted = kept - decay * w + update
            moved = (w + wanted).to(WEIGHT).to(tl.float32)
            rest = wanted - (moved - w)
            if WEIGHT == tl.bfloat16:  # noqa: SIM300
                rest = dithered(rest, noise_at(place + ((start + first) & (PERIOD - 1)).to(tl.int32), key))
            tl.store(extra + first + place, rest.to(WEIGHT), mask=inside)
        else:
            moved = w - decay * w + update
            if MODE == 1:
                moved = dithered(moved, noise_at(place + ((start + first) & (PERIOD - 1)).to(tl.int32), key))
        tl.store(weights + first + place, moved.to(WEIGHT), mask=inside)
        first += TILE


def step(tensors: StepTensors, settings: StepSettings) -> None:
    """`quantised_step`: one launch over the tensors that go by 128 bits, one over the others."""
    columns, law = tensors.columns, settings.law
    weights, grads, first = columns[:3]
    if not weights:
        return
    device, anything = weights[0].device, weights[0]
    narrow = {torch.float32: ("plain",), torch.float16: ("plain", "kahan", "master")}.get(weights[0].dtype)
    mode = settings.mode if narrow is None or settings.mode in narrow else "plain"
    betas = settings.betas
    scalars = {
        "rate": settings.rate, "decay": settings.decay,
        "gain_1": 1 - betas[0], "keep_2": betas[1], "gain_2": 1 - betas[1],
        "correction": settings.root, "eps": settings.eps, "threshold": threshold_at(settings.step),
        "key": settings.key,
    }  # fmt: skip
    sizes = [weight.numel() for weight in weights]
    addresses = [[t.data_ptr() for t in column] or [0] * len(weights) for column in columns]
    groups: dict[int, list[int]] = {16: [], 1: []}
    for i, size in enumerate(sizes):
        if size:
            whole = all(number % 16 == 0 for number in (size, *(addresses[c][i] for c in (0, 1, 2, 4, 6))))
            groups[16 if whole else 1].append(i)
    stream = stream_of(device)
    block = 256 if law is None else block_of(law)
    for align, members in groups.items():
        if not members:
            continue
        programs = tuple(-(-sizes[i] // (TILE * CHUNKS)) for i in members)
        rows, before = [], 0
        for i, count in zip(members, programs, strict=True):
            rows += [*(column[i] for column in addresses), sizes[i], tensors.starts[i] % _PERIOD, before]
            before += count
        with on_device_of(anything):
            step_kernel[(before,)](
                _tensors(tuple(rows), device, stream), _owners(programs, device, stream),
                anything if tensors.grad_scale is None else tensors.grad_scale,
                anything if tensors.skip is None else tensors.skip,
                table_of(law or "linear", True, device), table_of(law or "linear", False, device), **scalars,
                RULE=RULES[settings.rule], MODE=MODES[mode],
                WEIGHT=_TYPES[weights[0].dtype], GRAD=_TYPES[grads[0].dtype],
                MOMENT=_TYPES.get(first[0].dtype, tl.uint8), LAW=-1 if law is None else LAW_NUMBERS[law],
                SCALED=tensors.grad_scale is not None, SKIPS=tensors.skip is not None, ALIGN=align,
                BLOCK=block, ROWS=TILE // block, CHUNKS=CHUNKS, num_warps=WARPS,
            )  # fmt: skip


def _tensors(rows: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """int64 [tensors, COLUMNS] on `device`."""
    return _ROWS.find(
        (rows, device, stream), lambda: sent(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)
    )


def _owners(programs: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """int32 [programs] on `device`: the row of the tensor that each program works at."""

    def made() -> Tensor:
        numbers = torch.arange(len(programs), dtype=torch.int32, device="cpu")
        return sent(numbers.repeat_interleave(torch.tensor(programs, device="cpu")), device)

    return _OWNERS.find((programs, device, stream), made)


# Room for the tables of all tensors at once, and of each alone: what steps from inside a backward ask for.
_ROWS: Kept[Tensor] = Kept(1 << 18, Tensor.numel)
_OWNERS: Kept[Tensor] = Kept(1 << 24, Tensor.numel)


def _cases() -> list[Case]:
    bf16, fp32 = tl.bfloat16, tl.float32
    names = ("rate", "decay", "gain_1", "keep_2", "gain_2", "correction", "eps", "threshold")
    signature = {
        "tensors": "*i64", "owners": "*i32", "grad_scale": "*fp32", "skip": "*fp32", "signed_table": "*fp32",
        "unsigned_table": "*fp32", **dict.fromkeys(names, "fp32"), "key": "i32",
    }  # fmt: skip
    listed = [
        ("companded", "adamw", "sr", bf16, 0, 16),
        ("companded, unaligned", "adamw", "sr", bf16, 0, 1),
        ("companded kahan", "adamw", "kahan", bf16, 0, 16),
        ("companded master", "adamw", "master", bf16, 0, 16),
        ("companded, float32 weights", "adamw", "plain", fp32, 0, 16),
        ("linear", "adamw", "sr", bf16, 1, 16),
        ("dynamic", "adamw", "sr", bf16, 2, 16),
        ("four", "adamw", "sr", bf16, 3, 16),
        ("float32", "adamw", "sr", bf16, -1, 16),
        ("bfloat16", "adamw", "sr", bf16, -1, 16),
        ("companded", "lion", "sr", bf16, 0, 16),
        ("companded", "direction", "plain", fp32, 0, 16),
    ]
    cases = []
    for name, rule, mode, weight, law, align in listed:
        block = 128 if law == 3 else 256
        shape = {
            "RULE": RULES[rule], "MODE": MODES[mode], "WEIGHT": weight, "GRAD": weight,
            "MOMENT": bf16 if name == "bfloat16" else fp32, "LAW": law, "ALIGN": align,
            "SCALED": rule != "direction", "SKIPS": rule != "direction",
            "BLOCK": block, "ROWS": TILE // block, "CHUNKS": CHUNKS,
        }  # fmt: skip
        cases.append(Case(f"{rule} {name}", step_kernel, signature, shape, WARPS, wide=align == 16))
    return cases


AOT_CASES = _cases()
