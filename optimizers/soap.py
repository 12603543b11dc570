"""SOAP (arXiv:2409.11321): Adam in the eigenbasis of Shampoo's preconditioner.

    L ← β2 L + (1 - β2) G Gᵀ,  R ← β2 R + (1 - β2) Gᵀ G,   Q_L, Q_R their eigenvectors
    G' = Q_Lᵀ G Q_R,   M ← β1 M + (1 - β1) G',   V ← β2 V + (1 - β2) G'²
    W ← (W - η √(1 - β2^t) / (1 - β1^t) · Q_L (M / (√V + ε)) Q_Rᵀ) (1 - η λ)

The bases come from eigenvectors at the first step, which updates no weight, and from one power iteration and
a QR every `precondition_frequency` steps; M moves with its basis, V is put into the new order of eigenvalues.
A side longer than `max_precond_dim` keeps the identity. Matrices take turns in renewing their bases.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from .cost import Cost, state_traffic, weight_traffic
from .galore import galore_update
from .matrix import Group, MatrixOptimizer, gather, matrix_bytes, scatter
from .moments import State, computing_dtype, new_moment
from .products import fast_dtype, multiply
from .subspace import turn
from .weights import Step

_SIDES = ("left", "right")


def state_bytes(shape: tuple[int, ...], config: Any, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state for a matrix: two moments, and two squares for each side that is not too long."""
    stack = torch.Size(shape[:-2]).numel()
    elements = torch.Size(shape).numel()
    squares = sum(2 * stack * side**2 for side in shape[-2:] if side <= config.max_precond_dim)
    return matrix_bytes(shape, config, dtype, moments=(elements, elements), full=squares)


def update_cost(shape: tuple[int, ...], config: Any, dtype: torch.dtype) -> Cost:
    """Into the basis and back, an outer product a side, a renewal's products and QR in their share."""
    n = torch.Size(shape).numel()
    sides = [side for side in shape[-2:] if side <= config.max_precond_dim]
    stack = torch.Size(shape[:-2]).numel()
    squares = sum(3 * stack * side**2 for side in sides)
    renewal = sum(10.0 * stack * side**3 for side in sides) / config.precondition_frequency
    moved = weight_traffic(n, dtype) + state_traffic(2 * n, config) + 4 * squares
    return Cost(moved, sum(6.0 * n * side for side in sides) + renewal)


class SOAP(MatrixOptimizer):
    """SOAP as a `torch.optim.Optimizer`; see the module, and `MatrixOptimizer` for groups.

    `precondition_frequency`, `max_precond_dim`, `betas`, `eps` and `weight_decay` may stand in a group. The
    preconditioners are in the computing type whatever `state_bits`: eigenvectors of rounded ones are noise.
    """

    matrix_keys = ("precondition_frequency", "max_precond_dim")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10_000,
        *,
        stagger: bool = True,
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
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
            stagger=stagger,
            bias_free_eps=True,
        )

    def new_state(self, state: State, weight: Tensor, group: Group) -> None:
        """Moments in the eigenbasis, the two preconditioners and their eigenvectors."""
        bits = group["state_bits"]
        new_moment(state, "exp_avg", tuple(weight.shape), bits=bits, like=weight)
        new_moment(state, "exp_avg_sq", tuple(weight.shape), bits=bits, like=weight, signed=False)
        exact = computing_dtype(weight.dtype)
        for side, length in zip(_SIDES, weight.shape[1:], strict=True):
            if length <= group["max_precond_dim"]:
                square = (len(weight), length, length)
                state[side] = torch.zeros(square, dtype=exact, device=weight.device)
                state[f"basis_{side}"] = torch.zeros(square, dtype=exact, device=weight.device)

    def update(
        self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]
    ) -> Step | None:
        """See the module."""
        exact = grad.to(computing_dtype(grad.dtype))
        product = self.product_dtype or fast_dtype(grad)
        fast = exact.to(product)
        each = len(grad) // len(states)
        beta1, beta2 = group["betas"]
        if step == 1:
            for i, state in enumerate(states):
                self._observe(state, fast[i * each : (i + 1) * each], beta2)
                for side in self._sides(state):
                    state[f"basis_{side}"].copy_(_eigenvectors(state[side]))
            return None

        rotated = rotate(fast, states, product).to(exact.dtype)
        exp_avg, exp_avg_sq = gather(states, "exp_avg"), gather(states, "exp_avg_sq")
        normal = galore_update(rotated, exp_avg, exp_avg_sq, betas=(beta1, beta2), eps=group["eps"])
        scatter(states, "exp_avg", exp_avg, step)
        scatter(states, "exp_avg_sq", exp_avg_sq, step)
        direction = rotate(normal.to(product), states, product, back=True)

        places = sum(len(g["params"]) for g in self.param_groups) if group["stagger"] else 1
        for i, (state, index) in enumerate(zip(states, indices, strict=True)):
            self._observe(state, fast[i * each : (i + 1) * each], beta2)
            place = index if group["stagger"] else 0
            if turn(step, group["precondition_frequency"], place, places)[0] == 0:
                self._renew(state, step)
        rate = float(group["lr"])
        # The count of updates is one behind: the first step made none.
        factor = -rate * sqrt(1 - beta2 ** (step - 1)) / (1 - beta1 ** (step - 1))
        factor *= 1 - rate * group["weight_decay"]  # the published order decays after the update

        def add(target: Tensor, rows: slice) -> None:
            target.add_(direction[:, rows], alpha=factor)

        return add

    @staticmethod
    def _sides(state: State) -> list[str]:
        return [side for side in _SIDES if side in state]

    def _observe(self, state: State, grad: Tensor, beta: float) -> None:
        for side in self._sides(state):
            outer = multiply(grad, grad.mT) if side == "left" else multiply(grad.mT, grad)
            state[side].lerp_(outer.to(state[side].dtype), 1 - beta)

    def _renew(self, state: State, step: int) -> None:
        """One power iteration and QR; M moves to the new basis, V's entries follow their eigenvectors."""
        exp_avg, exp_avg_sq = gather([state], "exp_avg"), gather([state], "exp_avg_sq")
        for side in self._sides(state):
            square, basis = state[side], state[f"basis_{side}"]
            estimates = (basis * (square @ basis)).sum(-2)
            order = estimates.argsort(-1, descending=True)
            columns = order.unsqueeze(-2).expand_as(basis)
            sorted_basis = basis.gather(-1, columns)
            new = torch.linalg.qr(square @ sorted_basis)[0]
            if not bool(torch.isfinite(new).all()):
                continue
            overlap = new.mT @ basis
            if side == "left":
                exp_avg = overlap @ exp_avg
                exp_avg_sq = exp_avg_sq.gather(-2, order.unsqueeze(-1).expand_as(exp_avg_sq))
            else:
                exp_avg = exp_avg @ overlap.mT
                exp_avg_sq = exp_avg_sq.gather(-1, order.unsqueeze(-2).expand_as(exp_avg_sq))
            basis.copy_(new)
        scatter([state], "exp_avg", exp_avg, step)
        scatter([state], "exp_avg_sq", exp_avg_sq, step)


def rotate(matrix: Tensor, states: list[State], product: torch.dtype, *, back: bool = False) -> Tensor:
    """Q_Lᵀ matrix Q_R, or Q_L matrix Q_Rᵀ with `back`; a side without a basis stays."""
    if "basis_left" in states[0]:
        left = torch.cat([s["basis_left"] for s in states]).to(product)
        matrix = multiply(left if back else left.mT, matrix)
    if "basis_right" in states[0]:
        right = torch.cat([s["basis_right"] for s in states]).to(product)
        matrix = multiply(matrix, right.mT if back else right)
    return matrix


def _eigenvectors(square: Tensor) -> Tensor:
    """Eigenvectors [B, k, k] by falling eigenvalue; the identity where the decomposition fails."""
    eye = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    try:
        vectors: Tensor = torch.linalg.eigh(square + 1e-30 * eye)[1]
        return vectors.flip(-1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it
        return eye.expand_as(square).clone()
