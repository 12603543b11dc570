"""AdamW and Lion with state in 32 to 4 bits and weights that may be bfloat16: `adamw.py`'s rules for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..ops.codec import Law
from .matrix import MatrixOptimizer, as_groups

_CODES: tuple[Law, ...] = ("companded", "linear", "dynamic")


class AdamW(MatrixOptimizer):
    """AdamW with `state_bits` and `weights`, as a `torch.optim.Optimizer`; one tensor can step alone.

    state_code: the law of 8 bits (`ops/codec.py`); "dynamic" is bitsandbytes' table. ValueError for options
    out of range.
    """

    allowed_bits = (32, 16, 8, 4)
    scales_gradients = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        state_code: Law = "companded",
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
            state_code=_known(state_code),
        )


class Lion(MatrixOptimizer):
    """Lion (arXiv:2302.06675) with `state_bits` and `weights`; arguments as AdamW's, without eps."""

    allowed_bits = (32, 16, 8, 4)
    scales_gradients = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        state_bits: int = 32,
        state_code: Law = "companded",
        weights: str = "sr",
        seed: int = 0,
    ) -> None:
        super().__init__(
            [{**group, "kind": "adamw"} for group in as_groups(params)],
            lr=lr,
            betas=betas,
            eps=0.0,
            weight_decay=weight_decay,
            state_bits=state_bits,
            weights=weights,
            seed=seed,
            state_code=_known(state_code),
            rule="lion",
        )


def _known(code: Law) -> Law:
    if code not in _CODES:
        raise ValueError(f"state_code is {code!r}; allowed: {', '.join(map(repr, _CODES))}")
    return code
