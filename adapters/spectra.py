"""Singular values and vectors of weights, in float64, and how many of them matter.

float64 because the vectors are computed again when a run resumes. Two that belong to near-equal singular
values turn into each other by about (rounding of the arithmetic) / (gap): in float32 that is a few per cent
for the closest pair of a matrix of 576, in float64 it is below the rounding of what is stored, whatever the
machine or the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SMALL = 512  # below this side the exact decomposition takes a fraction of a second
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


def dense_weight(base: Any) -> Tensor:
    """The weight of a linear layer as float64 [out, in]; a 4-bit one dequantised, GPT-2's Conv1D turned."""
    from transformers.pytorch_utils import Conv1D

    weight = base.weight
    if hasattr(weight, "quant_state"):
        import bitsandbytes.functional as bnb

        value: Tensor = bnb.dequantize_4bit(weight.data, weight.quant_state)
    else:
        value = weight.detach()
    if value.device.type == "mps":  # it has no float64
        value = value.cpu()
    return value.double().t() if isinstance(base, Conv1D) else value.double()


def thin_svd(matrix: Tensor, r: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """u [m, k], s [k] and v [n, k] of a float64 `matrix` [m, n] = u diag(s) v^T; k is r, or all.

    A few vectors of a large matrix come from a randomised range finder with power iterations (Halko,
    Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4), with random numbers that are always the same. The
    largest entry of each u is positive, so that signs do not depend on the library.
    """
    small = min(matrix.shape)
    r = small if r is None else min(r, small)
    if small > _SMALL and 4 * r <= small:
        u, s, v = _randomised(matrix, r + _OVERSAMPLING)
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.t()
    u, s, v = u[:, :r], s[:r], v[:, :r]
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return u * signs, s, v * signs


def _randomised(matrix: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], columns, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(_POWER_ITERATIONS):
        q = torch.linalg.qr(matrix.t() @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, vh = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return q @ u, s, vh.t()


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of a float64 matrix, descending; those below 1e-8 of the largest are noise."""
    gram = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
    return values


def energy_rank(values: Tensor, energy: float) -> int:
    """The smallest r with sum of the r largest squares >= energy * sum of all. values: descending."""
    squares = values.square()
    total = squares.sum()
    if total == 0:
        return 1
    # a share of 1 - 1e-12 is all of it: the sum of all may round to a little less than itself
    reached = squares.cumsum(0) >= min(energy, 1 - 1e-12) * total
    return int(reached.int().argmax()) + 1


def elbow_rank(values: Tensor) -> int:
    """Where the spectrum turns flat: the point of (k, log value) that is farthest below its chord.

    Ours: SoKA (arXiv:2506.15251) names an elbow and does not define it. k counts from 1 and is the number of
    values up to and with that point. All of them where none lies below the chord. values: descending; zeros
    and what is below 1e-8 of the largest are left out first.
    """
    kept = values[values > 1e-8 * values[0]]
    if len(kept) < 3:
        return max(1, len(kept))
    logs = kept.log()
    chord = torch.linspace(float(logs[0]), float(logs[-1]), len(logs), dtype=logs.dtype, device=logs.device)
    below = chord - logs
    # the distance to a straight line is this vertical one times a constant
    return int(below.argmax()) + 1 if float(below.max()) > 1e-12 else len(kept)


def sketch(left: Tensor, right: Tensor) -> float:
    """One number that changes when columns of left [m, k] and right [n, k] turn into each other.

    sum over i of cos(i) (p . left_i)(q . right_i) with fixed p and q, over the root of the sum of squares of
    the products, so that it is of the size of 1. A common sign of a pair does not matter.
    """
    first = torch.cos(torch.arange(1, left.shape[0] + 1, dtype=torch.float64))
    second = torch.sin(torch.arange(1, right.shape[0] + 1, dtype=torch.float64))
    products = (first @ left.double().cpu()) * (second @ right.double().cpu())
    weights = torch.cos(torch.arange(len(products), dtype=torch.float64))
    size = products.norm()
    return float(weights @ products / size) if size > 0 else 0.0
