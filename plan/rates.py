"""Measured rates of the machine: matrix products, copies, durable writes. Below a second in all."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..recipes.errors import UserError
from .limits import existing_parent

# Square products: 1,024 on a CPU (2 GFLOP, some ms on two cores), 8,192 on a GPU (1.1 TFLOP), where smaller
# ones do not fill the device.
_CPU_SIDE = 1024
_CUDA_SIDE = 8192
_SECONDS_EACH = 0.15


@dataclass(frozen=True)
class Rates:
    """matmul in floating-point operations a second, the others in bytes a second.

    host_link: between an accelerator and pinned host memory, each way while the other way is busy too; 0 on a
    CPU, where both are one.
    """

    matmul_bf16: float
    matmul_fp32: float
    copy: float
    disk_write: float
    host_link: float = 0.0


def measure_rates(device: str, output_dir: Path) -> Rates:
    """Measure all on `device`; the disk below `output_dir`. UserError: it cannot be written."""
    return Rates(
        matmul_bf16=_matmul(device, torch.bfloat16),
        matmul_fp32=_matmul(device, torch.float32),
        copy=_copy(device),
        disk_write=_disk(output_dir),
        host_link=_host_link() if device.startswith("cuda") else 0.0,
    )


def _best_seconds(call: Callable[[], object], device: str) -> float:
    """Fastest of the calls that fit into the slice: noise only ever adds time."""

    def timed() -> float:
        started = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - started

    timed()
    end = time.perf_counter() + _SECONDS_EACH
    best = timed()
    while time.perf_counter() < end:
        best = min(best, timed())
    return best


def _matmul(device: str, dtype: torch.dtype) -> float:
    side = _CUDA_SIDE if device.startswith("cuda") else _CPU_SIDE
    with torch.no_grad():
        left = torch.ones(side, side, dtype=dtype, device=device)
        right = torch.ones(side, side, dtype=dtype, device=device)
        return 2.0 * side**3 / _best_seconds(lambda: left @ right, device)


def _copy(device: str) -> float:
    # 64 MB: larger than a cache, small enough that one copy takes milliseconds.
    source = torch.ones(16 << 20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _host_link() -> float:
    """Not run on a GPU yet."""
    there = torch.ones(16 << 20, dtype=torch.float32, device="cuda")
    other = torch.empty_like(there)
    here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
    back = torch.empty_like(here, pin_memory=True)
    out = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # has no annotations
    into = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def both_ways() -> None:
        with torch.cuda.stream(out):
            here.copy_(there, non_blocking=True)
        with torch.cuda.stream(into):
            other.copy_(back, non_blocking=True)

    return there.nbytes / _best_seconds(both_ways, "cuda")


def _disk(output_dir: Path) -> float:
    folder = existing_parent(output_dir)
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".shoestring-probe-") as file:
            started = time.perf_counter()
            written, seconds = 0, 0.0
            # Doubling sizes: a slow disk stops after 4 MB, a fast one is not measured by its latency alone.
            for blocks in (4, 8, 16, 32):
                for _ in range(blocks):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                written += blocks * len(block)
                seconds = time.perf_counter() - started
                if seconds > 0.1:
                    break
    except OSError as error:
        raise UserError(
            f"output_dir      cannot write below {folder}: {error.strerror or error}.\n"
            f"                Choose a folder that you may write: output_dir=PATH"
        ) from error
    return written / seconds
