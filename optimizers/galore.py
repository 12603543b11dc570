"""GaLore (arXiv:2403.03507): Adam on the gradient's coordinates in a slowly moving subspace.

For G [m, n], taller than wide or else transposed, with orthonormal P [k, r] of its smaller side:

    R = G P,   M, V: moments of R,   N = M / (√V + ε)
    W ← (W - η √(1 - β2^t) / (1 - β1^t) · scale · N Pᵀ) (1 - η λ)

P follows the gradient every `update_proj_gap` steps. Beside the published rule (`projection="svd"`,
`moments_on_refresh="keep"`, `stagger=False`): the subspace is iterated instead of decomposed, matrices take
turns, and the moments are turned into the new basis, M ← M Pᵀ_old P_new and V ← V (Pᵀ_old P_new)².
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..ops.low_rank import add_product, project, subspace_step
from ..ops.low_rank_torch import moved_step
from .cost import Cost, state_traffic, weight_traffic
from .matrix import Group, check_rank, gather, matrix_bytes, resolve_rank, scatter
from .moments import State, advance, computing_dtype, is_narrow, new_moment
from .products import fast_dtype, multiply
from .subspace import leading_basis, random_basis, turn
from .two_pass import TwoPassOptimizer, noise_for
from .weights import Step


def state_bytes(shape: tuple[int, ...], config: Any, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state for a matrix: two moments [l, r] and the basis [k, r]."""
    stack, (m, n) = torch.Size(shape[:-2]).numel(), shape[-2:]
    rank = min(resolve_rank(config.rank, shape), m, n)
    moment = stack * max(m, n) * rank
    return matrix_bytes(shape, config, dtype, moments=(moment, moment)) + basis_bytes(
        stack * min(m, n) * rank, config.state_bits, dtype
    )


def update_cost(shape: tuple[int, ...], config: Any, dtype: torch.dtype) -> Cost:
    """A product into the subspace and one back; a refresh is one more, and a QR."""
    n, k = torch.Size(shape).numel(), min(shape[-2:])
    rank = min(resolve_rank(config.rank, shape), k)
    stack = torch.Size(shape[:-2]).numel()
    moved = weight_traffic(n, dtype) + state_traffic(2 * n // k * rank + stack * k * rank / 2, config)
    refresh = (2.0 * n * rank + 4.0 * stack * k * rank**2) / config.update_proj_gap
    return Cost(moved, 4.0 * n * rank + refresh)


def basis_bytes(elements: int, bits: int, dtype: torch.dtype) -> int:
    """Bytes of a basis: bfloat16 where state is in 16 or 8 bits, for 8 would spoil its orthogonality."""
    return elements * (computing_dtype(dtype).itemsize if bits == 32 else 2)


galore_update = moved_step


class GaLore(TwoPassOptimizer):
    """GaLore as a `torch.optim.Optimizer`; see the module for the rule and `MatrixOptimizer` for groups.

    `rank`, `scale`, `update_proj_gap`, `betas`, `eps` and `weight_decay` may stand in a group. rank None is a
    quarter of each matrix's smaller side. product_dtype: type of the products with the basis; None is
    bfloat16 where the processor multiplies it natively.
    """

    matrix_keys = ("rank", "scale")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int | None = 128,
        scale: float = 0.25,
        update_proj_gap: int = 200,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        projection: str = "subspace",
        moments_on_refresh: str = "rotate",
        stagger: bool = True,
        state_bits: int = 32,
        weights: str = "sr",
        seed: int = 0,
        product_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if projection not in ("subspace", "svd", "random"):
            raise ValueError(f"projection is {projection!r}; allowed: 'subspace', 'svd', 'random'")
        if moments_on_refresh not in ("rotate", "keep", "reset"):
            raise ValueError(
                f"moments_on_refresh is {moments_on_refresh!r}; allowed: 'rotate', 'keep', 'reset'"
            )
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
            scale=scale,
            update_proj_gap=update_proj_gap,
            projection=projection,
            moments_on_refresh=moments_on_refresh,
            stagger=stagger,
            bias_free_eps=True,
            **options,
        )

    def check(self, name: str, shape: tuple[int, ...], group: Group) -> None:
        """The rank must not exceed the smaller side."""
        check_rank(type(self).__name__, group["rank"], name, shape)

    def new_state(self, state: State, weight: Tensor, group: Group) -> None:
        """Moments of the projected gradient, and the basis (zero until the first gradient is seen)."""
        stack, m, n = weight.shape
        rank, bits = resolve_rank(group["rank"], weight.shape), group["state_bits"]
        shape = (stack, max(m, n), rank)
        new_moment(state, "exp_avg", shape, bits=bits, like=weight)
        new_moment(state, "exp_avg_sq", shape, bits=bits, like=weight, signed=False)
        state["basis"] = new_basis((stack, min(m, n), rank), bits, weight)

    def update(self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]) -> Step:
        """See the module."""
        coordinates, basis = self.coordinates(grad, states, group, step, indices)
        return back_projection(coordinates, basis, wide=grad.shape[-2] < grad.shape[-1])

    def write(
        self,
        weights: list[Tensor],
        grad: Tensor,
        states: list[State],
        group: Group,
        step: int,
        indices: list[int],
        keep: float,
    ) -> None:
        """See TwoPassOptimizer."""
        sides = self.coordinates(grad, states, group, step, indices)
        left, right = sides[::-1] if grad.shape[-2] < grad.shape[-1] else sides
        parts = (side.chunk(len(weights)) for side in (left, right))
        for weight, a, b, index in zip(weights, *parts, indices, strict=True):
            add_product(weight, a, b, keep=keep, noise=noise_for(weight, group, step, index))

    def coordinates(
        self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        """The step in the subspace [B, l, r], rate and sign included, and the basis; the states move on."""
        each = len(grad) // len(states)
        for i, (state, index) in enumerate(zip(states, indices, strict=True)):
            self._refresh(grad[i * each : (i + 1) * each], state, group, step, index)
        basis = torch.cat([s["basis"] for s in states]).to(self.product_dtype or fast_dtype(grad))
        projected = project(grad, basis)
        clip = self.scale_on(grad)
        projected = projected if clip is None else projected * clip
        projected = self.precondition(projected, states, group, step)
        rate, (beta1, beta2) = float(group["lr"]), group["betas"]
        factor = -rate * group["scale"] * sqrt(1 - beta2**step) / (1 - beta1**step)
        # The published order decays after the update; weights are written with decay before it.
        factor *= 1 - rate * group["weight_decay"]
        if is_narrow(states[0]):
            moved = advance(states, projected, betas=group["betas"], eps=group["eps"], step=step)
            return moved.mul_(factor).to(basis.dtype), basis
        moments = gather(states, "exp_avg"), gather(states, "exp_avg_sq")
        step_in_it = subspace_step(
            projected, *moments, betas=group["betas"], eps=group["eps"], factor=factor, dtype=basis.dtype
        )
        scatter(states, "exp_avg", moments[0], step)
        scatter(states, "exp_avg_sq", moments[1], step)
        return step_in_it, basis

    def precondition(self, projected: Tensor, states: list[State], group: Group, step: int) -> Tensor:
        """What Adam sees of the projected gradient [B, l, r]: here all of it as it is."""
        return projected

    def forget(self, state: State) -> None:
        """What else in the state belongs to the old basis."""

    def _refresh(self, grad: Tensor, state: State, group: Group, step: int, index: int) -> None:
        places = sum(len(g["params"]) for g in self.param_groups) if group["stagger"] else 1
        since, number = turn(step, group["update_proj_gap"], index if group["stagger"] else 0, places)
        if since:
            return
        exact = computing_dtype(grad.dtype)
        old: Tensor = state["basis"]
        seed = (group["seed"] * 1_000_003 + number) * 65_537 + index
        found = []
        for e, matrix in enumerate(grad):
            if group["projection"] == "random":
                found.append(random_basis(old.shape[1], old.shape[2], seed=seed + e, like=grad))
            else:
                previous = old[e] if step > 1 else None
                found.append(
                    leading_basis(
                        matrix, previous, old.shape[2], seed=seed + e, exact=group["projection"] == "svd"
                    )
                )
        new = torch.stack(found)
        if step > 1:
            self._turn_moments(state, group["moments_on_refresh"], old.to(exact).mT @ new, step)
            self.forget(state)
        old.copy_(new)

    def _turn_moments(self, state: State, how: str, overlap: Tensor, step: int) -> None:
        if how == "keep":
            return
        exp_avg, exp_avg_sq = gather([state], "exp_avg"), gather([state], "exp_avg_sq")
        if how == "rotate":
            scatter([state], "exp_avg", exp_avg @ overlap, step)
            scatter([state], "exp_avg_sq", exp_avg_sq @ overlap.square(), step)
        else:
            scatter([state], "exp_avg", torch.zeros_like(exp_avg), step)
            scatter([state], "exp_avg_sq", torch.zeros_like(exp_avg_sq), step)


def new_basis(shape: tuple[int, ...], bits: int, like: Tensor) -> Tensor:
    """A zero basis in the type that `basis_bytes` counts."""
    dtype = computing_dtype(like.dtype) if bits == 32 else torch.bfloat16
    return torch.zeros(shape, dtype=dtype, device=like.device)


def back_projection(coordinates: Tensor, basis: Tensor, *, wide: bool) -> Step:
    """Adds coordinates [B, l, r] times basisᵀ [B, r, k], transposed where the weights are wide."""

    def add(target: Tensor, rows: slice) -> None:
        if wide:
            target.add_(multiply(basis[:, rows], coordinates.mT))
        else:
            target.add_(multiply(coordinates[:, rows], basis.mT))

    return add
