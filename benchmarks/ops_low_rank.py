"""Rows of benchmarks/ops.py: steps of APOLLO, GaLore and FRUGAL, beside the formulas as one would write them.

`plain` is the published rule in a dozen lines of eager PyTorch, to nearest; `compiled` the same under
torch.compile; galore-torch is the authors' package (its SVD falls outside what is timed: one at the start).

    python benchmarks/ops.py --only ops_low_rank
    python benchmarks/ops_low_rank.py        (the floors of an H200, computed)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from math import sqrt
from typing import Any

import torch
from ops_timing import H200_COPY, H200_MATMUL, Row, median_seconds
from shoestring.optimizers import APOLLO, FRUGAL, APOLLOMini, GaLore, clip_by_global_norm, clip_for_step
from torch import nn

# Larger and smaller side, and the matrices of a shape in Llama-3-8B.
LLAMA = [(4096, 4096, 64), (4096, 1024, 64), (14336, 4096, 96)]
LAYERS = sum(long * short * count for long, short, count in LLAMA)
DENSITY = 0.25
GAP = 1 << 20  # no refresh of a subspace while the clock runs

Run = Callable[[], object]


def rows(device: torch.device) -> list[Row]:
    """On a CPU a tall and a wide matrix in float32 and bfloat16, on a GPU those of Llama-3-8B in bfloat16."""
    if device.type == "cpu":
        cases = [((4096, 1024), torch.float32), ((1024, 4096), torch.float32), ((4096, 1024), torch.bfloat16)]
    else:
        cases = [(shape, torch.bfloat16) for shape in ((4096, 4096), (14336, 4096), (4096, 14336))]
    return [row for i, case in enumerate(cases) for row in _of_shape(*case, device, compiles=i == 0)]


def h200_rows() -> list[Row]:
    """What a step of all layers of Llama-3-8B, in bfloat16, cannot do without."""
    found = []
    for name, rank in (("APOLLO", 256), ("APOLLO-Mini", 1), ("GaLore", 128), ("FRUGAL", 0)):
        costs = [(_cost(name, (long, short), rank, 2), count) for long, short, count in LLAMA]
        moved, flops = (sum(cost[i] * count for cost, count in costs) for i in (0, 1))
        found.append(Row(f"{name} rank {rank}, {LAYERS:.3g} weights", {}, moved, flops))
    return found


def _cost(name: str, shape: tuple[int, int], rank: int, size: int) -> tuple[float, float]:
    """(bytes, FLOPs): gradients twice, or once where pass 2 has no use for them; weights there and back."""
    n, long, short = shape[0] * shape[1], max(shape), min(shape)
    if name == "FRUGAL":
        return 3 * size * n + 16 * DENSITY * n, 0.0
    state = 16 * long * rank + size * short * rank
    if name == "GaLore":
        return 3 * size * n + state + 2 * size * long * rank, 4.0 * n * rank
    return 4 * size * n + state, 2.0 * n * rank


def _of_shape(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *, compiles: bool
) -> list[Row]:
    kinds: list[tuple[str, Any, int, dict[str, Any]]] = [
        ("APOLLO", APOLLO, 256, {"rank": 256}),
        ("APOLLO-Mini", APOLLOMini, 1, {}),
        ("GaLore", GaLore, 128, {"rank": 128}),
        ("FRUGAL", FRUGAL, 0, {"density": DENSITY}),
    ]
    found = []
    for name, kind, rank, options in kinds:
        contenders: dict[str, Run] = {"ours": _stepper(kind, shape, dtype, device, **options)}
        if device.type == "cuda":
            contenders["ours, torch"] = _through_torch(_stepper(kind, shape, dtype, device, **options))
        if name != "FRUGAL":
            contenders["plain"] = _plain(name, rank, shape, dtype, device)
        if compiles and name != "FRUGAL":
            contenders["compiled"] = _plain(name, rank, shape, dtype, device, compiled=True)
        if name == "GaLore":
            contenders["galore-torch"] = _galore_torch(rank, shape, dtype, device)
        seconds = median_seconds(contenders, device, rounds=9)
        label = f"{name}, {shape[0]} x {shape[1]}, {str(dtype)[6:]}"
        moved, flops = _cost(name, shape, rank, dtype.itemsize)
        found.append(Row(label, seconds, moved, flops, note=f"rank {rank}" if rank else "by columns"))
        if compiles:
            found.append(_clipped(kind, f"{label}, clipped", shape, dtype, device, moved, flops, options))
    return found


def _clipped(
    kind: Any, label: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, moved: float,
    flops: float, options: dict[str, Any],
) -> Row:  # fmt: skip
    """Norm, clipping and step, in the step or apart from it; the floor is the step's alone."""

    def clipping(clip: Callable[..., object]) -> Run:
        p = _parameter(shape, dtype, device)
        optimizer = kind([p], lr=1e-4, update_proj_gap=GAP, **options)

        limits = (0.99**i * p.numel() ** 0.5 for i in count())  # less each time, or scaling once is enough

        def run() -> None:
            clip(optimizer, [p], next(limits))
            optimizer.step()

        return run

    contenders = {
        "ours": clipping(clip_for_step),
        "apart": clipping(lambda _, parameters, limit: clip_by_global_norm(parameters, limit)),
    }
    seconds = median_seconds(contenders, device, rounds=9)
    return Row(label, seconds, moved, flops, note="with the global norm")


def _parameter(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    p = nn.Parameter(torch.randn(shape, device=device).to(dtype))
    p.grad = torch.randn(shape, device=device).to(dtype)
    return p


def _stepper(
    kind: Any, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, **options: Any
) -> Run:
    optimizer = kind([_parameter(shape, dtype, device)], lr=1e-4, update_proj_gap=GAP, **options)
    return lambda: optimizer.step()


def _through_torch(run: Run) -> Run:
    def under() -> None:
        before = os.environ.get("SHOESTRING_OPS")
        os.environ["SHOESTRING_OPS"] = "low_rank=torch"
        run()
        del os.environ["SHOESTRING_OPS"]
        if before is not None:
            os.environ["SHOESTRING_OPS"] = before

    return under


def _galore_torch(rank: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Run:
    from galore_torch import GaLoreAdamW

    group = {"rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    p = _parameter(shape, dtype, device)
    optimizer = GaLoreAdamW([{"params": [p], **group}], lr=1e-4, no_deprecation_warning=True)
    return lambda: optimizer.step()


def _plain(
    name: str, rank: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device,
    *, compiled: bool = False,
) -> Run:  # fmt: skip
    p = _parameter(shape, dtype, device)
    w, g = p.detach(), p.grad
    m, v = torch.zeros(2, max(shape), rank, device=device)
    basis = torch.randn(min(shape), rank, device=device).div_(sqrt(rank)).to(dtype)
    norm = torch.ones((), device=device)

    def step() -> None:
        tall = g if shape[0] >= shape[1] else g.mT
        r = (tall @ basis).float()
        m.mul_(0.9).add_(r, alpha=0.1)
        v.mul_(0.999).addcmul_(r, r, value=0.001)
        n = m / (v.sqrt() + 1e-6)
        if name == "GaLore":
            update = 0.25 * (n.to(dtype) @ basis.mT)
        else:
            over = -1 if name == "APOLLO" else (0, 1)
            update = tall * (n.norm(dim=over, keepdim=True) / (r.norm(dim=over, keepdim=True) + 1e-8)).to(
                dtype
            )
            now = update.norm().float()
            update = update / torch.clamp(now / (norm + 1e-8), min=1.01).mul(1 / 1.01).to(dtype)
            norm.copy_(torch.minimum(now, 1.01 * norm))
        w.sub_(1e-4 * (update if shape[0] >= shape[1] else update.mT))

    return torch.compile(step) if compiled else step


if __name__ == "__main__":
    for row in h200_rows():
        floor = max(row.bytes / H200_COPY, row.flops / H200_MATMUL)
        print(f"{row.name:40} {row.bytes / LAYERS:6.2f} B a weight  {floor * 1e3:6.2f} ms")
