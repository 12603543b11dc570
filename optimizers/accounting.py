"""What an optimizer costs, by the name in a recipe: bytes of state and of gradients, and the work of a step.

Bytes of state are exactly those that the optimizers of this package allocate:

| optimizer                    | bytes for a tensor of n elements                              | once |
|------------------------------|---------------------------------------------------------------|------|
| adamw                        | 2 n itemsize + 4 (moments in the parameter's dtype, step)     |      |
| adamw_8bit, paged_adamw_8bit | n < 4096: 8 n; else 2 n + 8 ceil(n / 256) (a scale per block) | 2048 |
| lion_8bit                    | n < 4096: 4 n; else n + 4 ceil(n / 256)                       | 1024 |

"once" are the tables of 256 float32 values that all 8-bit tensors share. Each of our own states its matrices'
bytes beside its rule (`state_bytes(shape, config, dtype)`); the other tensors have AdamW's, in `state_bits`.
"""

import math
from collections.abc import Iterable
from typing import assert_never

import torch

from ..recipes.optimizers import (
    Adafactor,
    AdaLomo,
    AdamMini,
    AdamW,
    AdamW8bit,
    Apollo,
    ApolloMini,
    BAdam,
    Came,
    Cosmos,
    Frugal,
    GaLore,
    Lion,
    Lion8bit,
    Lomo,
    Muon,
    NaturalGaLore,
    OptimizerConfig,
    PagedAdamW8bit,
    QApollo,
    ScheduleFreeAdamW,
    Soap,
)
from . import adalomo, adamw, apollo, badam, cosmos, frugal, galore, lomo, muon, natural_galore, soap
from .build import asks_for_own_adamw
from .cost import Cost, adamw_cost, state_traffic, weight_traffic
from .from_libraries import library_state_bytes
from .roles import Slot

BLOCK = 256
"""Elements that share one scale in bitsandbytes' 8-bit states."""
SMALLEST_8BIT = 4096
"""bitsandbytes keeps the states of smaller tensors in float32."""


def state_bytes(config: OptimizerConfig, slots: Iterable[Slot], dtype: torch.dtype) -> int:
    """Bytes of state after the first step, for trained parameters like these, all of `dtype`."""
    trained = list(slots)
    elements = [slot.elements for slot in trained]
    match config:
        case AdamW():
            if asks_for_own_adamw(config, dtype):
                return sum(adamw.state_bytes(slot.shape, config, dtype) for slot in trained)
            return sum(2 * n * dtype.itemsize + 4 for n in elements)
        case AdamW8bit() | PagedAdamW8bit():
            return _blockwise(elements, states=2)
        case Lion8bit():
            return _blockwise(elements, states=1)
        case Lion():
            return sum(adamw.state_bytes(slot.shape, config, dtype, rule="lion") for slot in trained)
        case Apollo() | ApolloMini() | QApollo():
            rule = apollo.state_bytes
        case NaturalGaLore():
            rule = natural_galore.state_bytes
        case GaLore():
            rule = galore.state_bytes
        case Frugal():
            return _frugal(config, trained, dtype)
        case Cosmos():
            rule = cosmos.state_bytes
        case Muon():
            rule = muon.state_bytes
        case Soap():
            rule = soap.state_bytes
        case BAdam():
            return badam.state_bytes(((slot.name, slot.shape) for slot in trained), config, dtype)
        case Lomo():
            return sum(lomo.state_bytes(slot.shape, config, dtype) for slot in trained)
        case AdaLomo():
            return sum(adalomo.state_bytes(slot.shape, config, dtype) for slot in trained)
        case Adafactor() | AdamMini() | Came() | ScheduleFreeAdamW():
            return library_state_bytes(config, [(slot.name, slot.shape) for slot in trained], dtype)
        case _:
            assert_never(config)
    return sum(
        (rule if slot.role == "matrix" else adamw.state_bytes)(slot.shape, config, dtype) for slot in trained
    )


def gradient_elements(config: OptimizerConfig, slots: Iterable[Slot], *, accumulates: bool) -> int:
    """Elements of gradients that are alive together. accumulates: a step may have several micro-batches."""
    trained = list(slots)
    if isinstance(config, BAdam) and trained:
        return badam.largest_elements(((slot.name, slot.shape) for slot in trained), config)
    sizes = [slot.elements for slot in trained]
    if getattr(config, "step_in_backward", False) and not accumulates:
        return max(sizes, default=0)
    return sum(sizes)


def update_cost(config: OptimizerConfig, slots: Iterable[Slot], dtype: torch.dtype) -> Cost:
    """Cost of one step of all trained parameters."""
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
            case Lion():
                total += Cost(weight_traffic(n, dtype) + state_traffic(n, config))
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


def _frugal(config: Frugal, trained: list[Slot], dtype: torch.dtype) -> int:
    """With `blocks` the active matrices change: the largest ones count, for that may come."""
    others = sum(adamw.state_bytes(s.shape, config, dtype) for s in trained if s.role != "matrix")
    matrices = [s for s in trained if s.role == "matrix"]
    if config.projection != "blocks":
        return others + sum(frugal.state_bytes(s.shape, config, dtype) for s in matrices)
    matrices.sort(key=lambda slot: slot.elements, reverse=True)
    count = round(config.density * len(matrices))
    return others + sum(
        frugal.state_bytes(slot.shape, config, dtype, active=place < count)
        for place, slot in enumerate(matrices)
    )


def _blockwise(elements: list[int], *, states: int) -> int:
    total = sum(states * (4 * n if n < SMALLEST_8BIT else n + 4 * math.ceil(n / BLOCK)) for n in elements)
    quantized = any(n >= SMALLEST_8BIT for n in elements)
    return total + (states * 4 * 256 if quantized else 0)
