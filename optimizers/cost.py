"""What an update cannot do without: bytes through memory, and floating-point operations in matrix products.

What the plan's time of a step and the floor in benchmarks/optimizers.py are made of. Each rule states its
matrices' cost beside its code (`update_cost(shape, config, dtype)`), a refresh at its share of a step;
weights and gradients have one type and are read and written once where the rule allows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """bytes: read and written; flops: operations in matrix products."""

    bytes: float
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, *, bytes_per_second: float, flops_per_second: float) -> float:
        """Both after each other, at these rates."""
        return self.bytes / bytes_per_second + self.flops / flops_per_second


def weight_traffic(elements: int, dtype: torch.dtype, *, grad_reads: int = 1) -> float:
    """Bytes of reading the gradient, and of reading and writing the weight."""
    return elements * dtype.itemsize * (2 + grad_reads)


def state_traffic(elements: float, config: Any) -> float:
    """Bytes of reading and writing `elements` of state in state_bits."""
    return 2 * elements * getattr(config, "state_bits", 32) / 8


def adamw_cost(elements: int, config: Any, dtype: torch.dtype) -> Cost:
    """Two moments."""
    return Cost(weight_traffic(elements, dtype) + state_traffic(2 * elements, config))
