"""Cross entropy of rows of logits, and its gradient in their place (`ops/cross_entropy.py` has the formulas).

A program takes one row, reads it once for the loss, and for the gradient once more and writes it: 2 or 4
bytes a logit from memory (the second reading may hit the cache), 2 or 4 back. There is no second tensor as
large as the logits, and everything between is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .case import Case
from .launching import on_device_of

BLOCK, WARPS = 8192, 16


@triton.jit
def _score(logits, bias, place, vocabulary, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """float32 logits at `place` of a row, capped, and what tanh was; anything past the end."""
    z = tl.load(logits + place, mask=place < vocabulary, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + place, mask=place < vocabulary, other=0.0).to(tl.float32)
    t = z
    if HAS_CAP:
        t = 2 * tl.sigmoid(2 * z / softcap) - 1  # tanh
        z = softcap * t
    return z, t


@triton.jit
def rows_kernel(
    logits, bias, labels, factors, losses, sums, vocabulary, softcap, smoothing,
    LOSS: tl.constexpr, GRADIENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses and sums [rows], or with LOSS off sums as they are given; with GRADIENT logits become slopes."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    there = (label >= 0) & (label < vocabulary)
    softcap, smoothing = tl.cast(softcap, tl.float32), tl.cast(smoothing, tl.float32)
    size = tl.cast(vocabulary, tl.float32)
    if LOSS:
        largest = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        wanted, every = total, total
        for start in range(0, vocabulary, BLOCK):
            place = start + tl.arange(0, BLOCK)
            z, _ = _score(logits, bias, place, vocabulary, softcap, HAS_BIAS, HAS_CAP)
            inside = place < vocabulary
            wanted += tl.sum(tl.where(place == label, z, 0.0))
            every += tl.sum(tl.where(inside, z, 0.0))
            z = tl.where(inside, z, float("-inf"))  # after the cap: a capped -inf would be a number
            above = tl.maximum(largest, tl.max(z))
            least = tl.where(above == float("-inf"), 0.0, above)  # nothing but -inf so far: no NaN from it
            total = total * tl.exp(largest - least) + tl.sum(tl.exp(z - least))
            largest = above
        log_sum = largest + tl.log(total)
        loss = log_sum - wanted
        if smoothing != 0:  # 0 times an infinite sum would be NaN
            loss += smoothing * (wanted - every / size)
        tl.store(losses + row, tl.where(there, loss, float("nan")))
        tl.store(sums + row, log_sum)
    else:
        log_sum = tl.load(sums + row)
    if GRADIENT:
        factor = tl.full((), 1.0, tl.float32)
        if HAS_FACTOR:
            factor = tl.load(factors + row).to(tl.float32)
        for start in range(0, vocabulary, BLOCK):
            place = start + tl.arange(0, BLOCK)
            z, t = _score(logits, bias, place, vocabulary, softcap, HAS_BIAS, HAS_CAP)
            slope = tl.exp(z - log_sum) - smoothing / size
            slope = tl.where(place == label, slope - (1 - smoothing), slope)
            if HAS_CAP:
                slope *= 1 - t * t
            slope = tl.where(there, slope * factor, float("nan"))
            tl.store(logits + place, slope, mask=place < vocabulary)


def losses_of_rows(
    logits: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    smoothing: float = 0.0,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses and log-sums, float32 [rows], of logits [rows, V]; with `gradient` logits become slopes.

    The logits are contiguous, labels int64 and each in [0, V): what comes of another one is NaN.
    """
    losses, sums = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    _launch(logits, labels, sums, bias, softcap, smoothing, losses=losses, gradient=gradient)
    return losses, sums


def slopes_of_rows(
    logits: Tensor,
    labels: Tensor,
    factors: Tensor,
    sums: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
) -> None:
    """Logits [rows, V] become the slopes of their losses times factors [rows]; sums: of `losses_of_rows`."""
    _launch(logits, labels, sums, bias, softcap, 0.0, factors=factors.contiguous())


def _launch(
    logits: Tensor,
    labels: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    smoothing: float,
    *,
    losses: Tensor | None = None,
    factors: Tensor | None = None,
    gradient: bool = True,
) -> None:
    """With `losses` these and the sums are written, else the sums are read."""
    if not len(logits):
        return
    # of what is not there any pointer
    with on_device_of(logits):
        rows_kernel[(len(logits),)](
            logits, logits if bias is None else bias.contiguous(), labels.contiguous(),
            sums if factors is None else factors, sums if losses is None else losses, sums,
            logits.shape[1], 1.0 if softcap is None else softcap, smoothing,
            LOSS=losses is not None, GRADIENT=gradient, HAS_BIAS=bias is not None,
            HAS_CAP=softcap is not None, HAS_FACTOR=factors is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def _cases() -> list[Case]:
    cases = []
    for name, dtype, loss, gradient, extra in (
        ("loss of rows bf16", "*bf16", True, False, False),
        ("loss and gradient of rows bf16", "*bf16", True, True, False),
        ("loss and gradient of rows bf16, bias, softcap", "*bf16", True, True, True),
        ("gradient of rows bf16, bias, softcap, factors", "*bf16", False, True, True),
        ("loss and gradient of rows fp32", "*fp32", True, True, False),
    ):
        signature = {"logits": dtype, "bias": "*fp32", "labels": "*i64", "vocabulary": "i32"}
        signature |= dict.fromkeys(("factors", "losses", "sums"), "*fp32")
        signature |= dict.fromkeys(("softcap", "smoothing"), "fp32")
        flags = {"LOSS": loss, "GRADIENT": gradient, "HAS_BIAS": extra, "HAS_CAP": extra}
        shape = {**flags, "HAS_FACTOR": not loss, "BLOCK": BLOCK}
        cases.append(Case(name, rows_kernel, signature, shape, WARPS, aligned=("vocabulary",)))
    return cases


AOT_CASES = _cases()
