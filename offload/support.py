"""Which optimizers' state can be moved out of the device, and why the others' cannot."""

from __future__ import annotations

from typing import assert_never

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


def supports(config: OptimizerConfig) -> str | None:
    """None where the state of this optimizer can be moved to host memory or disk, else the reason."""
    match config:
        case Frugal() if config.projection == "blocks":
            return "with projection=blocks its state wanders from matrix to matrix; take another projection"
        case (
            AdamW() | Lion() | Apollo() | ApolloMini() | QApollo() | GaLore() | NaturalGaLore()
            | Frugal() | Cosmos() | Muon() | Soap()
        ):  # fmt: skip
            return None
        case BAdam():
            return "it holds the state of one block of layers only, and makes it anew for the next"
        case Lomo() | AdaLomo():
            return "it has no state worth moving"
        case AdamW8bit() | PagedAdamW8bit() | Lion8bit():
            return (
                "bitsandbytes keeps its 8-bit state in memory; optimizer=adamw optimizer.state_bits=8 can be "
                "moved"
            )
        case Adafactor() | AdamMini() | Came() | ScheduleFreeAdamW():
            return "a library owns its state; optimizer=adamw can be moved"
        case _:
            assert_never(config)
