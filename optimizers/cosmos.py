"""COSMOS (arXiv:2502.17410): SOAP on the leading eigenvectors of GᵀG, Muon on what they leave.

With U [n, r] followed by one power iteration and a QR a step, S its share of the second moment, and V the
second moment of G U (written from the equations):

    M ← β1 M + G,   b1 = (1 - β1^t) / (1 - β1),   b2 = 1 - β2^t
    U ← qr(β2 U S + (1 - β2) Gᵀ G U),   S ← β2 Tᵀ S T + (1 - β2) (G U)ᵀ (G U),   T = U_oldᵀ U
    V ← β2 V + (1 - β2) (G U)²
    Ĝ = (G + β1 M) / (1 + β1 b1)     (with nesterov, else M / b1)
    A = Ĝ U / (√(V / b2) + ε) Uᵀ,   B = √(m n) NS(Ĝ - Ĝ U Uᵀ) / |NS(·)|,   D = A + γ B
    W ← (1 - η λ) W - η · lr_ratio · √(m n) · D / |D|

so that the root mean square of an update is η times lr_ratio. Without nesterov the released code takes G
where the paper has M: we follow the paper. n is the second dimension of a weight, its inputs.
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
from .muon import orthogonalise, orthogonalise_flops
from .products import fast_dtype, multiply
from .subspace import random_basis
from .weights import Step


def state_bytes(shape: tuple[int, ...], config: Any, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state for a matrix: momentum m n, moment m r, basis n r and its share r r."""
    stack, (m, n) = torch.Size(shape[:-2]).numel(), shape[-2:]
    r = min(config.rank, m, n)
    moments = (torch.Size(shape).numel(), stack * m * r)
    return matrix_bytes(shape, config, dtype, moments=moments, full=stack * (n * r + r * r))


def update_cost(shape: tuple[int, ...], config: Any, dtype: torch.dtype) -> Cost:
    """Six products with the basis (three to follow it, one into it, two back), a QR, Newton-Schulz."""
    n, r = torch.Size(shape).numel(), min(config.rank, *shape[-2:])
    stack = torch.Size(shape[:-2]).numel()
    moved = weight_traffic(n, dtype) + state_traffic(n + stack * shape[-2] * r, config)
    flops = 12.0 * n * r + 4.0 * stack * shape[-1] * r**2 + orthogonalise_flops(shape)
    return Cost(moved, flops)


class COSMOS(MatrixOptimizer):
    """COSMOS as a `torch.optim.Optimizer`; see the module, and `MatrixOptimizer` for groups.

    `rank`, `gamma`, `lr_ratio`, `nesterov`, `betas`, `eps` and `weight_decay` may stand in a group. A rank
    above the smaller side of a matrix is cut to it.
    """

    matrix_keys = ("rank", "gamma")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 64,
        gamma: float = 0.2,
        lr_ratio: float = 0.2,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        *,
        state_bits: int = 32,
        weights: str = "sr",
        seed: int = 0,
        product_dtype: torch.dtype | None = None,
    ) -> None:
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
            rank=rank,
            gamma=gamma,
            lr_ratio=lr_ratio,
            nesterov=nesterov,
        )

    def new_state(self, state: State, weight: Tensor, group: Group) -> None:
        """Momentum, basis, its share of the second moment, and the second moment in it."""
        stack, m, n = weight.shape
        r, bits = min(group["rank"], m, n), group["state_bits"]
        exact = computing_dtype(weight.dtype)
        new_moment(state, "momentum", (stack, m, n), bits=bits, like=weight)
        new_moment(state, "exp_avg_sq", (stack, m, r), bits=bits, like=weight, signed=False)
        start = random_basis(n, r, seed=group["seed"], like=weight).to(exact)
        state["basis"] = start.expand(stack, -1, -1).clone()
        state["share"] = torch.zeros(stack, r, r, dtype=exact, device=weight.device)

    def update(self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]) -> Step:
        """See the module."""
        exact = grad.to(computing_dtype(grad.dtype))
        product = self.product_dtype or fast_dtype(grad)
        fast = exact.to(product)
        beta1, beta2 = group["betas"]
        momentum, exp_avg_sq = gather(states, "momentum"), gather(states, "exp_avg_sq")
        momentum.mul_(beta1).add_(exact)
        scatter(states, "momentum", momentum, step)

        old = torch.cat([s["basis"] for s in states])
        share = torch.cat([s["share"] for s in states])
        new, share, seen = follow(fast, old, share, beta2, first=step == 1)
        for state, basis, part in zip(states, new.chunk(len(states)), share.chunk(len(states)), strict=True):
            state["basis"].copy_(basis)
            state["share"].copy_(part)
        exp_avg_sq.mul_(beta2).addcmul_(seen, seen, value=1 - beta2)
        scatter(states, "exp_avg_sq", exp_avg_sq, step)

        b1, b2 = (1 - beta1**step) / (1 - beta1), 1 - beta2**step
        if group["nesterov"]:
            ahead = exact.add(momentum, alpha=beta1).mul_(1 / (1 + beta1 * b1))
        else:
            ahead = momentum / b1
        direction = cosmos_direction(ahead, new, exp_avg_sq / b2, group["gamma"], group["eps"], product)
        m, n = grad.shape[-2:]
        length = torch.linalg.vector_norm(direction, dim=(-2, -1), keepdim=True)
        factor = (-float(group["lr"]) * group["lr_ratio"] * sqrt(m * n)) / (length + group["eps"])

        def add(target: Tensor, rows: slice) -> None:
            target.addcmul_(direction[:, rows], factor)

        return add


def follow(
    grad: Tensor, basis: Tensor, share: Tensor, beta: float, *, first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, G U) after this gradient [B, m, n]; the first one takes three iterations from a random basis."""
    product = grad.dtype
    new = basis
    for _ in range(3 if first else 1):
        seen = multiply(grad.mT, multiply(grad, new.to(product))).to(basis.dtype)
        mixed = seen if first else beta * (basis @ share) + (1 - beta) * seen
        mixed = mixed / mixed.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(mixed.dtype).tiny)
        found = torch.linalg.qr(mixed)[0]
        new = torch.where(torch.isfinite(found).all(-1).all(-1)[:, None, None], found, new)
    projected = multiply(grad, new.to(product)).to(basis.dtype)
    turned = basis.mT @ new
    carried = torch.zeros_like(share) if first else beta * (turned.mT @ share @ turned)
    return new, carried + (1 - beta) * (projected.mT @ projected), projected


def cosmos_direction(
    ahead: Tensor, basis: Tensor, second: Tensor, gamma: float, eps: float, product: torch.dtype
) -> Tensor:
    """D [B, m, n] of the module's formula. second: V / b2 [B, m, r]."""
    m, n = ahead.shape[-2:]
    fast = basis.to(product)
    inside = multiply(ahead.to(product), fast).to(ahead.dtype)
    adam = inside / (second.sqrt() + eps)
    # One product back for both: A and the residual share U.
    back = multiply(torch.cat([adam, inside], dim=-2).to(product), fast.mT).to(ahead.dtype)
    residual = orthogonalise((ahead - back[:, m:]).to(product)).to(ahead.dtype)
    length = torch.linalg.vector_norm(residual, dim=(-2, -1), keepdim=True)
    return back[:, :m].addcmul(residual, gamma * sqrt(m * n) / (length + eps))
