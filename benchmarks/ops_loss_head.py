"""The output head with cross entropy, forward and backward: ours, PyTorch's, Liger's, CCE's, whole logits.

Frozen is what an adapter's run has: two products. A trained head has three. On a CPU memory is what the
process grew by at its largest, since PyTorch's own works inside one operation, where no counter looks.

    python benchmarks/ops.py --device cpu --only ops_loss_head
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from ops_timing import Row, extra_memory, median_seconds
from shoestring.ops import cross_entropy_sum
from shoestring.ops.cross_entropy import reference
from torch import Tensor, nn

# (positions, vocabulary, width): SmolLM2-135M's twice, and that of a model of 1 B with Llama 3's words.
CPU_SHAPES = [(256, 49152, 576), (1024, 49152, 576), (256, 128256, 2048)]
OWN_CHUNKS = "PyTorch 2.13's, its own chunks"
CUDA_SHAPES = [(8192, 128256, 4096), (2048, 128256, 4096)]


def rows(device: torch.device) -> list[Row]:
    """Frozen and trained heads in bfloat16; on a CPU in float32 too, at the first shape."""
    if device.type != "cpu":
        cases = [(shape, trained, torch.bfloat16) for shape in CUDA_SHAPES for trained in (False, True)]
        return [_row(*case, device) for case in cases]
    small, middle, large = CPU_SHAPES
    cases = [(small, trained, kind) for kind in (torch.bfloat16, torch.float32) for trained in (False, True)]
    cases += [(middle, False, torch.bfloat16), (large, False, torch.bfloat16)]
    return [_row(*case, device) for case in cases]


def h200_rows() -> list[Row]:
    """What the head cannot do without, at Llama-3-8B's shapes."""
    return [_floor(shape, trained, torch.bfloat16, {}) for shape in CUDA_SHAPES for trained in (False, True)]


def _row(shape: tuple[int, int, int], trained: bool, dtype: torch.dtype, device: torch.device) -> Row:
    positions, vocabulary, width = shape
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=device).mul_(0.05).to(dtype).requires_grad_(trained)
    labels = torch.randint(vocabulary, (positions,), device=device)
    losses = _contenders(device, shape)
    if device.type == "cpu" and (trained or dtype == torch.float32 or positions > 256):
        losses.pop(OWN_CHUNKS, None)  # ten times ours and more, once is enough
    contenders = {name: _step(loss, hidden, weight, labels) for name, loss in losses.items()}
    seconds = median_seconds(contenders, device, rounds=3 if device.type == "cpu" else 7)
    memory = {}
    for name, run in contenders.items():
        hidden.grad = weight.grad = None
        memory[name] = _memory(run, device)
    return _floor(shape, trained, dtype, seconds, memory)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _contenders(device: torch.device, shape: tuple[int, int, int]) -> dict[str, Loss]:
    positions, vocabulary, _ = shape
    found: dict[str, Loss] = {"ours": cross_entropy_sum}
    if device.type == "cuda":
        found["ours, provider torch"] = _asked("torch")
        if find_spec("liger_kernel") is not None:
            found["Liger, chunks like ours"] = _asked("liger")
        if find_spec("cut_cross_entropy") is not None:
            found["CCE"], found["CCE, no filter"] = _cce("cce"), _cce("cce_exact")
    if hasattr(nn.functional, "linear_cross_entropy"):
        found[OWN_CHUNKS] = _native(None)
        rows = max(1, min(positions, (48 if device.type == "cpu" else 256) * 2**20 // vocabulary))
        found["PyTorch 2.13's, chunks like ours"] = _native(rows)
    found["whole logits"] = reference
    found["whole logits, compiled"] = torch.compile(reference, dynamic=False)
    return found


def _step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], None]:
    def run() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels).backward()

    return run


def _native(rows: int | None) -> Loss:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)

    return loss


def _cce(implementation: str) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, reduction="sum", impl=implementation)

    return loss


def _asked(provider: str) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with _environment(f"loss_head={provider}"):
            return cross_entropy_sum(hidden, weight, labels)

    return loss


@contextmanager
def _environment(wanted: str) -> Iterator[None]:
    before = os.environ.get("SHOESTRING_OPS")
    os.environ["SHOESTRING_OPS"] = wanted
    try:
        yield
    finally:
        del os.environ["SHOESTRING_OPS"]
        if before is not None:
            os.environ["SHOESTRING_OPS"] = before


def _memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak above what is there before, gradients included."""
    gc.collect()
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return extra_memory(run, device)
    ctypes.CDLL(None).malloc_trim(0)  # what has been freed is no memory to take from
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size is counted anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _floor(
    shape: tuple[int, int, int],
    trained: bool,
    dtype: torch.dtype,
    seconds: dict[str, float],
    memory: dict[str, int] | None = None,
) -> Row:
    """Hidden and weight read, their gradients written; the products alone."""
    positions, vocabulary, width = shape
    size = dtype.itemsize
    moved = size * (2 * positions * width + (2 if trained else 1) * vocabulary * width)
    name = f"head {positions} x {width} x {vocabulary}, {'trained' if trained else 'frozen'}, {dtype}"
    products = 3 if trained else 2
    flops = 2.0 * products * positions * vocabulary * width
    return Row(name.replace("torch.", ""), seconds, moved, flops, memory or {})
