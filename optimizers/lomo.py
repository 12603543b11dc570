"""LOMO (arXiv:2306.09782): plain SGD, which needs no state, made to step inside the backward pass.

    W ← (1 - η λ) W - η G

`in_backward.py` does the second part, for this and for every other optimizer of the family. An update has the
size of the gradient, so rates are those of SGD and clipping matters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .matrix import Group, MatrixOptimizer, matrix_bytes
from .moments import State
from .weights import Step


def state_bytes(shape: tuple[int, ...], config: Any, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state for a tensor: the step, and what `weights` keeps."""
    return matrix_bytes(shape, config, dtype)


def lomo_update(target: Tensor, grad: Tensor, *, lr: float) -> None:
    """target ← target - lr · grad, in the type of `target`."""
    target.add_(grad, alpha=-lr)


class LOMO(MatrixOptimizer):
    """LOMO as a `torch.optim.Optimizer` for tensors of all shapes; see the module, and `MatrixOptimizer`.

    state_bits has nothing to act on and is there because all optimizers take it.
    """

    matrix_keys = ()
    every_tensor = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        state_bits: int = 32,
        weights: str = "sr",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=(0.0, 0.0),
            eps=0.0,
            weight_decay=weight_decay,
            state_bits=state_bits,
            weights=weights,
            seed=seed,
        )

    def new_state(self, state: State, weight: Tensor, group: Group) -> None:
        """None."""

    def update(self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]) -> Step:
        """See the module."""
        rate = float(group["lr"])
        return lambda target, rows: lomo_update(target, grad[:, rows], lr=rate)
