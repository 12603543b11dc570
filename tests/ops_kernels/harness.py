"""What every test of a kernel uses: guarded outputs, closeness by norm, layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CANARY = 0x5A
GUARD = 4096  # bytes before and after


class Guarded:
    """Tensors whose memory lies between two bands of canaries; `check()` says whether one was touched."""

    def __init__(self) -> None:
        self._raw: list[Tensor] = []

    def empty(self, shape: Any, dtype: torch.dtype, device: str) -> Tensor:
        """An output to be filled: NaN, or -1 where the type has none."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = torch.Size(shape).numel()
        size = -(-count * dtype.itemsize // 16) * 16
        raw = torch.full((GUARD + size + GUARD,), CANARY, dtype=torch.uint8, device=device)
        self._raw.append(raw)
        inner = raw[GUARD : GUARD + count * dtype.itemsize].view(dtype)
        inner.fill_(float("nan") if dtype.is_floating_point else (255 if dtype == torch.uint8 else -1))
        self._sizes = [*getattr(self, "_sizes", []), count * dtype.itemsize]
        return inner.view(shape)

    def like(self, tensor: Tensor) -> Tensor:
        """A guarded copy of `tensor`, contiguous."""
        copy = self.empty(tensor.shape, tensor.dtype, tensor.device.type)
        copy.copy_(tensor)
        return copy

    def check(self) -> None:
        """AssertionError where something was written outside."""
        for raw, size in zip(self._raw, self._sizes, strict=True):
            assert bool((raw[:GUARD] == CANARY).all()), "written before an output"
            assert bool((raw[GUARD + size :] == CANARY).all()), "written behind an output"


def distance(ours: Tensor, exact: Tensor) -> float:
    """|ours - exact| / |exact| in float64; infinite where one has a value that is not finite."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    if not bool(torch.isfinite(ours).all() & torch.isfinite(exact).all()):
        return float("inf")
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-300))


TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
