"""AdamW with state in 32, 16 or 8 bits and weights that may be bfloat16: `adamw.py`'s rule for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .matrix import MatrixOptimizer, as_groups


class AdamW(MatrixOptimizer):
    """AdamW with `state_bits` and `weights`, as a `torch.optim.Optimizer`; one tensor can step alone."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        weights: str = "sr",
        seed: int = 0,
    ) -> None:
        super().__init__(
            [{**group, "kind": "adamw"} for group in as_groups(params)],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            state_bits=state_bits,
            weights=weights,
            seed=seed,
        )
