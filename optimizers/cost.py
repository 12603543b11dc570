"""What an update cannot do without: bytes through memory, and floating-point operations in matrix products.

The sums behind the plan's time of a step and behind the floor in benchmarks/optimizers.py. Each rule states
its matrices' cost beside its code (`update_cost(shape, config, dtype)`); a refresh is counted at its share of
a step. Sizes are for weights and gradients of one type, read and written once where the rule allows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..recipes.optimizers import (
    AdamW,
    AdamW8bit,
    Apollo,
    ApolloMini,
    BAdam,
    Cosmos,
    Frugal,
    GaLore,
    Lion8bit,
    Lomo,
    Muon,
    NaturalGaLore,
    OptimizerConfig,
    PagedAdamW8bit,
    QApollo,
    Soap,
)
from .roles import Slot


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


def update_cost(config: OptimizerConfig, slots: Iterable[Slot], dtype: torch.dtype) -> Cost:
    """Cost of one step of all trained parameters."""
    from . import apollo, cosmos, frugal, galore, muon, natural_galore, soap

    total = Cost(0.0)
    for slot in slots:
        n = slot.elements
        match config:
            case Lomo():
                total += Cost(weight_traffic(n, dtype))
            case AdamW8bit() | PagedAdamW8bit():
                total += Cost(weight_traffic(n, dtype) + 4 * n)
            case Lion8bit():
                total += Cost(weight_traffic(n, dtype) + 2 * n)
            case AdamW() | BAdam():
                total += adamw_cost(n, config, dtype)
            case _ if slot.role != "matrix":
                total += adamw_cost(n, config, dtype)
            case Apollo() | ApolloMini() | QApollo():
                total += apollo.update_cost(slot.shape, config, dtype)
            case NaturalGaLore():
                total += natural_galore.update_cost(slot.shape, config, dtype)
            case GaLore():
                total += galore.update_cost(slot.shape, config, dtype)
            case Frugal():
                total += frugal.update_cost(slot.shape, config, dtype)
            case Cosmos():
                total += cosmos.update_cost(slot.shape, config, dtype)
            case Muon():
                total += muon.update_cost(slot.shape, config, dtype)
            case Soap():
                total += soap.update_cost(slot.shape, config, dtype)
            case _:
                # Factored and libraries' rules: at least weight and gradient, and one reading more.
                total += Cost(weight_traffic(n, dtype, grad_reads=2))
    return total
