"""Muon: momentum whose singular values are all brought near one, for the matrices of linear layers.

    M ← β M + (1 - β) G,   U = NS((1 - β) G + β M with nesterov, else M)
    W ← (1 - η λ) W - η · a · U

NS is five steps of a quintic Newton-Schulz iteration; a = 0.2 √max(m, n) gives the update the root mean
square of AdamW's, whose rates then apply (arXiv:2502.16982), a = √max(1, m / n) is the first published one.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from .cost import Cost, state_traffic, weight_traffic
from .matrix import Group, MatrixOptimizer, gather, matrix_bytes, scatter
from .moments import State, computing_dtype, new_moment
from .products import fast_dtype, multiply
from .weights import Step

# Coefficients of x(a + b x² + c x⁴): steep at zero, so that small singular values rise within few steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def state_bytes(shape: tuple[int, ...], config: Any, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state for a matrix: one momentum."""
    return matrix_bytes(shape, config, dtype, moments=(torch.Size(shape).numel(),))


def orthogonalise_flops(shape: tuple[int, ...], steps: int = 5) -> float:
    """Operations of `steps` Newton-Schulz iterations: three products each."""
    n, k = torch.Size(shape).numel(), min(shape[-2:])
    return steps * (4.0 * n * k + 2.0 * torch.Size(shape[:-2]).numel() * k**3)


def update_cost(shape: tuple[int, ...], config: Any, dtype: torch.dtype) -> Cost:
    """One moment, and the iterations."""
    n = torch.Size(shape).numel()
    moved = weight_traffic(n, dtype) + state_traffic(n, config)
    return Cost(moved, orthogonalise_flops(shape, config.ns_steps))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """U Vᵀ of matrix [B, m, n] = U S Vᵀ, up to singular values in about 0.7 to 1.2; in the type given."""
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True, dtype=computing_dtype(wide.dtype))
    x = wide / (norm + 1e-7).to(wide.dtype)
    for _ in range(steps):
        gram = multiply(x, x.mT)
        inner = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C) if len(x) > 1 else _polynomial(gram)
        x = (
            torch.baddbmm(x, inner, x, beta=_A)
            if len(x) > 1
            else torch.addmm(x[0], inner[0], x[0], beta=_A)[None]
        )
    result: Tensor = x.mT if matrix.shape[-2] > matrix.shape[-1] else x
    return result


def _polynomial(gram: Tensor) -> Tensor:
    return torch.addmm(gram[0], gram[0], gram[0], beta=_B, alpha=_C)[None]


class Muon(MatrixOptimizer):
    """Muon as a `torch.optim.Optimizer`; see the module, and `MatrixOptimizer` for groups.

    `momentum`, `nesterov`, `ns_steps`, `adjust_lr` and `weight_decay` may stand in a group; betas and eps are
    of the AdamW that takes embeddings, head, norms and biases.
    """

    matrix_keys = ("momentum", "ns_steps")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        *,
        adjust_lr: str = "match_rms_adamw",
        state_bits: int = 32,
        weights: str = "sr",
        seed: int = 0,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        if adjust_lr not in ("match_rms_adamw", "original"):
            raise ValueError(f"adjust_lr is {adjust_lr!r}; allowed: 'match_rms_adamw', 'original'")
        self.product_dtype = product_dtype
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            state_bits=state_bits,
            weights=weights,
            seed=seed,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr=adjust_lr,
        )

    def new_state(self, state: State, weight: Tensor, group: Group) -> None:
        """The momentum."""
        new_moment(state, "momentum", tuple(weight.shape), bits=group["state_bits"], like=weight)

    def update(self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]) -> Step:
        """See the module."""
        exact = grad.to(computing_dtype(grad.dtype))
        momentum = gather(states, "momentum")
        momentum.lerp_(exact, 1 - group["momentum"])
        scatter(states, "momentum", momentum, step)
        ahead = exact.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        direction = orthogonalise(ahead.to(self.product_dtype or fast_dtype(grad)), group["ns_steps"])
        m, n = grad.shape[-2:]
        scale = 0.2 * sqrt(max(m, n)) if group["adjust_lr"] == "match_rms_adamw" else sqrt(max(1.0, m / n))
        rate = -float(group["lr"]) * scale

        def add(target: Tensor, rows: slice) -> None:
            target.add_(direction[:, rows], alpha=rate)

        return add
