"""WTA-CRS's weight gradient, and a product with some rows of a weight: does reading rows by index pay?

The gradient dW = G[rows]^T X is a copy of rows and a product; beside it the copy alone, the product alone
(what a gather for free would leave) and the copy in parts that stay in cache. The other: x W[kept]^T, a
layer whose masked rows are left out by indexing, beside the layer whose rows have been removed and the one
that multiplies all of them.

    python benchmarks/ops.py --device cpu --only ops_gathered
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from ops_timing import Row, extra_memory, median_seconds
from shoestring.ops.gathered import gathered_product
from torch import Tensor

# (tokens, out, in): SmolLM2-135M's q, gate and down, and one of a model of 1 B; on CUDA Llama-3-8B's.
CPU_SHAPES = [(1024, 576, 576), (1024, 1536, 576), (4096, 576, 1536), (2048, 4096, 1024)]
CUDA_SHAPES = [(8192, 1024, 4096), (8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336)]
RATIOS = (0.1, 0.3, 0.5)
PART = 256


def rows(device: torch.device) -> list[Row]:
    """Both questions at the shapes of `device`."""
    indexed = [(8192, 14336, 4096)]
    cases = [(shape, ratio, torch.bfloat16) for shape in CUDA_SHAPES for ratio in RATIOS]
    if device.type == "cpu":
        indexed = [(128, 1536, 576), (1024, 1536, 576), (1024, 4096, 1024)]
        cases = [(shape, ratio, torch.bfloat16) for shape in CPU_SHAPES for ratio in (0.1, 0.5)]
        cases += [(shape, 0.3, torch.float32) for shape in CPU_SHAPES]
    found = [row for case in cases for row in _gradient(*case, device)]
    types = sorted({dtype for *_, dtype in cases}, key=str)
    return [*found, *(_indexed(shape, dtype, device) for dtype in types for shape in indexed)]


def h200_rows() -> list[Row]:
    """What the gradient cannot do without, at Llama-3-8B's shapes."""
    return [_floor(shape, ratio, torch.bfloat16, {}) for shape in CUDA_SHAPES for ratio in RATIOS]


def in_parts(grad: Tensor, rows: Tensor, kept: Tensor, part: int = PART) -> Tensor:
    """The gradient with `part` rows gathered at a time, which are still in cache when they are multiplied."""
    buffer = torch.empty(min(part, len(rows)), grad.shape[1], dtype=grad.dtype, device=grad.device)
    total = None
    for start in range(0, len(rows), part):
        chosen = rows[start : start + part]
        gathered = buffer[: len(chosen)]
        torch.index_select(grad, 0, chosen, out=gathered)
        x = kept[start : start + part]
        total = gathered.t() @ x if total is None else total.addmm_(gathered.t(), x)
    assert total is not None
    return total


def _gradient(
    shape: tuple[int, int, int], ratio: float, dtype: torch.dtype, device: torch.device
) -> list[Row]:
    """The gradient, and the copy that is a part of it."""
    tokens, out, width = shape
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(tokens, generator=generator)[: int(tokens * ratio)].to(device)
    grad = torch.randn(tokens, out, device=device).to(dtype)
    kept = torch.randn(len(chosen), width, device=device).to(dtype)
    copied = grad.index_select(0, chosen)

    def ours() -> Tensor:
        return gathered_product(grad, chosen, kept, dtype)

    def kernel() -> Tensor:
        with _asked("wta_crs=triton"):
            return gathered_product(grad, chosen, kept, dtype)

    contenders: dict[str, Callable[[], object]] = {
        "ours": ours,
        "copy": lambda: grad.index_select(0, chosen),
        "product alone": lambda: copied.t() @ kept,
        f"in parts of {PART}": lambda: in_parts(grad, chosen, kept),
    }
    if device.type == "cuda":
        contenders["kernel, by name"] = kernel
    memory = {name: extra_memory(contenders[name], device) for name in contenders if name != "copy"}
    seconds = median_seconds(contenders, device, rounds=5)
    copy = Row("  of it the copy of rows", {"copy": seconds.pop("copy")}, bytes=2.0 * copied.nbytes)
    return [_floor(shape, ratio, dtype, seconds, memory), copy]


def _floor(
    shape: tuple[int, int, int],
    ratio: float,
    dtype: torch.dtype,
    seconds: dict[str, float],
    memory: dict[str, int] | None = None,
) -> Row:
    tokens, out, width = shape
    k = int(tokens * ratio)
    return Row(
        f"dW {out}x{width}, {k} of {tokens} rows, {str(dtype)[6:]}",
        seconds,
        bytes=dtype.itemsize * (k * out + k * width + out * width) + 8.0 * k,
        flops=2.0 * k * out * width,
        memory=memory or {},
        note="memory with the result" if memory else "",
    )


def _indexed(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Row:
    """x W[kept]^T where 30 % of the rows are masked."""
    tokens, out, width = shape
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(out, generator=generator)[: int(out * 0.7)].sort().values.to(device)
    x = torch.randn(tokens, width, device=device).to(dtype)
    weight = torch.randn(out, width, device=device).to(dtype)
    removed = weight[kept]
    contenders: dict[str, Callable[[], object]] = {
        "ours": lambda: x @ removed.t(),
        "indexed": lambda: x @ weight.index_select(0, kept).t(),
        "all rows, masked": lambda: x @ weight.t(),
    }
    size = dtype.itemsize * (tokens * width + len(kept) * (width + tokens))
    name = f"x W[kept], {len(kept)} of {out} rows, {tokens} x {width}, {str(dtype)[6:]}"
    note = "ours: the rows are removed for good"
    seconds = median_seconds(contenders, device)
    return Row(name, seconds, bytes=size, flops=2.0 * tokens * len(kept) * width, note=note)


@contextmanager
def _asked(providers: str) -> Iterator[None]:
    """Inside, SHOESTRING_OPS is `providers`."""
    before = os.environ.get("SHOESTRING_OPS")
    os.environ["SHOESTRING_OPS"] = providers
    try:
        yield
    finally:
        del os.environ["SHOESTRING_OPS"]
        if before is not None:
            os.environ["SHOESTRING_OPS"] = before
