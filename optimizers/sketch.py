"""Random projections that cost no memory: one pool of normal numbers, a window of it for each tensor.

A projection of [k, r] for each of hundreds of tensors, stored, is a fifth of APOLLO's memory; drawn again at
every step it would cost more than the sketch. Both are avoided by drawing k r numbers once for all tensors
and refresh, and letting tensor i read them from place 32 i on. Two tensors' projections then consist of the
same numbers in other places, so they are as good as independent: neighbours differ by a shift of whole rows
or parts of one. The pool follows from seed and refresh number alone, and is drawn on the CPU: every rank,
device and resumed run has the same one, and no checkpoint holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 32  # a cache line of bfloat16; windows stay aligned for matrix products


class SketchPool:
    """Draws projections. size: the largest k r; tensors: how many there are."""

    def __init__(self, size: int, tensors: int) -> None:
        self.length = size + SHIFT * tensors
        self._key: tuple[int, int] | None = None
        self._held: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def projection(
        self, k: int, r: int, *, index: int, seed: int, refresh: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """[k, r] of independent N(0, 1/r) entries for tensor `index` in period `refresh`; E|Px|² = |x|²."""
        if self._key != (seed, refresh):
            self._key, self._held = (seed, refresh), {}
        pool = self._held.get((device, dtype))
        if pool is None:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + refresh) & 0x7FFF_FFFF_FFFF)
            drawn = torch.randn(self.length, generator=generator, dtype=torch.float32)
            pool = self._held[device, dtype] = drawn.to(device=device, dtype=dtype)
        first = SHIFT * index
        window = pool[first : first + k * r].view(k, r)
        scaled: Tensor = window.mul(r**-0.5)
        return scaled
