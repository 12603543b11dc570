"""Bytes of optimizer state, exactly those that the optimizers of this package allocate.

| optimizer                    | bytes for a tensor of n elements                              | once |
|------------------------------|---------------------------------------------------------------|------|
| adamw                        | 2 n itemsize + 4 (moments in the parameter's dtype, step)     |      |
| adamw_8bit, paged_adamw_8bit | n < 4096: 8 n; else 2 n + 8 ceil(n / 256) (a scale per block) | 2048 |
| lion_8bit                    | n < 4096: 4 n; else n + 4 ceil(n / 256)                       | 1024 |

"once" are the tables of 256 float32 values that all 8-bit tensors share.
"""

import math
from collections.abc import Iterable
from typing import assert_never

import torch

from ..recipes.choices import AdamW, AdamW8bit, Lion8bit, OptimizerConfig, PagedAdamW8bit

BLOCK = 256
"""Elements that share one scale in bitsandbytes' 8-bit states."""
SMALLEST_8BIT = 4096
"""bitsandbytes keeps the states of smaller tensors in float32."""


def state_bytes(config: OptimizerConfig, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of state after the first step, for trained parameters of these shapes, all of `dtype`."""
    elements = [math.prod(shape) for shape in shapes]
    match config:
        case AdamW():
            return sum(2 * n * dtype.itemsize + 4 for n in elements)
        case AdamW8bit() | PagedAdamW8bit():
            return _blockwise(elements, states=2)
        case Lion8bit():
            return _blockwise(elements, states=1)
        case _:
            assert_never(config)


def _blockwise(elements: list[int], *, states: int) -> int:
    total = sum(states * (4 * n if n < SMALLEST_8BIT else n + 4 * math.ceil(n / BLOCK)) for n in elements)
    quantized = any(n >= SMALLEST_8BIT for n in elements)
    return total + (states * 4 * 256 if quantized else 0)
