"""How benchmarks/ops.py measures: contenders in turns, medians, the machine's own limits in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

# What an H200 reaches, for floors where no GPU is at hand: bytes read and written, bf16 FLOP, a second.
H200_COPY, H200_MATMUL = 4.3e12, 790e12


@dataclass(frozen=True)
class Row:
    """One operation at one shape: seconds of each contender (ours is `ours`), and what it needs at least.

    bytes: read and written at least; flops: in matrix products; memory: bytes beyond inputs and outputs.
    """

    name: str
    seconds: Mapping[str, float]
    bytes: float
    flops: float = 0.0
    memory: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


def median_seconds(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int = 7
) -> dict[str, float]:
    """Median seconds of each, in turns, so that what disturbs the machine disturbs all; one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(_seconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy far larger than the caches."""
    size = 256 << 20 if device.type == "cpu" else 4 << 30
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    seconds = median_seconds({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.nbytes / seconds


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP a second of a large product of random numbers."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / median_seconds({"matmul": lambda: a @ b}, device)["matmul"]


def extra_memory(run: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that `run` allocates above what is there before (CUDA; on a CPU with `LiveBytes`)."""
    from shoestring.plan.live_bytes import LiveBytes

    with LiveBytes(device) as live:
        result = run()
        peak = live.peak
    del result
    return peak


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3
