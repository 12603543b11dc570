"""How to start from a rate that suits AdamW: the table that `learning_rate: auto` and the docs use.

A factor of one means that the update has AdamW's root mean square by construction (a fifth of the rate for
each element), as with Muon's and COSMOS's scaling, APOLLO's automatic `scale`, and every kind of AdamW. The
others follow from the size of their update; benchmarks/quality.py tries each at the factor and at three
times it, and docs/optimizers.md has the losses.
"""

from __future__ import annotations

RATE_OVER_ADAMW: dict[str, float] = {
    "adamw": 1.0,
    "adamw_8bit": 1.0,
    "paged_adamw_8bit": 1.0,
    "adam_mini": 1.0,
    "badam": 1.0,
    "frugal": 1.0,
    "soap": 1.0,
    "muon": 1.0,
    "cosmos": 1.0,
    "apollo": 1.0,
    "apollo_mini": 1.0,
    "q_apollo": 1.0,
    # A quarter of the coordinates times 0.25: the update is an eighth of AdamW's.
    "galore": 8.0,
    "natural_galore": 8.0,
    # Every element moves by the rate, not by a fifth of it.
    "lion": 0.2,
    "lion_8bit": 0.2,
    "came": 1.0,
    # Relative to the root mean square of each weight, which is near 0.05 in a trained model, at 1e-3 at
    # least.
    "adafactor": 20.0,
    "adalomo": 20.0,
    # No second moment: the rate has to stand for the size of the gradient, which clipping to 1 fixes.
    "lomo": 1000.0,
    "schedule_free_adamw": 2.0,
}


def rate_over_adamw(name: str) -> float:
    """Factor on AdamW's rate for the optimizer that a recipe calls `name`."""
    return RATE_OVER_ADAMW[name]
