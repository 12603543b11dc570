"""APOLLO and APOLLO-Mini (arXiv:2412.05270): Adam's scale of a gradient, learned from a random sketch of it.

For G [m, n] with a sketch R of its smaller side (R = G P [m, r] if m ≥ n, else Gᵀ P [n, r]), moments of R
give one factor a channel, s_j = |N_j| / |R_j| with N = M / (√V + ε), or one a tensor (Mini, r = 1). The
update is the whole gradient times s: full rank, with no momentum on its direction.

    U = s G √scale,  kept from growing by more than `norm_growth_limit` a step (arXiv:2410.01623)
    W ← (W - η √(1 - β2^t) / (1 - β1^t) U) (1 - η λ)

The sketch shrinks N's norm against R's by √(r / k), k the smaller side; scale = k / r undoes it, and AdamW's
rates apply.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..ops.low_rank import FirstPass, add_scaled, apollo_factors, first_pass
from ..ops.low_rank import provider as low_rank_provider
from ..ops.low_rank_torch import add_rows, apollo_norms, factors_of
from .cost import Cost, state_traffic, weight_traffic
from .matrix import Group, check_rank, gather, matrix_bytes, resolve_rank, scatter
from .moments import State, advance, computing_dtype, is_narrow, new_moment
from .products import fast_dtype
from .sketch import SketchPool
from .two_pass import TwoPassOptimizer, noise_for
from .weights import Step


def state_bytes(shape: tuple[int, ...], config: Any, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state for a matrix: two moments of the sketch and the last norm. The sketch costs nothing."""
    stack, (m, n) = torch.Size(shape[:-2]).numel(), shape[-2:]
    sketch = stack * max(m, n) * min(resolve_rank(getattr(config, "rank", 1), shape), m, n)
    return matrix_bytes(shape, config, dtype, moments=(sketch, sketch), full=stack)


def update_cost(shape: tuple[int, ...], config: Any, dtype: torch.dtype) -> Cost:
    """The gradient is read for the sketch and for the update, the sketch is one product."""
    n = torch.Size(shape).numel()
    rank = min(resolve_rank(getattr(config, "rank", 1), shape), *shape[-2:])
    sketched = n // min(shape[-2:]) * rank
    return Cost(weight_traffic(n, dtype, grad_reads=2) + state_traffic(2 * sketched, config), 2.0 * n * rank)


apollo_update = apollo_norms


class APOLLO(TwoPassOptimizer):
    """APOLLO as a `torch.optim.Optimizer`; see the module for the rule and `MatrixOptimizer` for groups.

    `rank`, `scale`, `update_proj_gap`, `betas`, `eps` and `weight_decay` may stand in a group. rank None is a
    quarter of each matrix's smaller side; scale None is smaller side / rank. sketch_dtype: type of the matrix
    products with the sketch; None is bfloat16 where the processor multiplies it natively.
    """

    matrix_keys = ("rank", "scale")
    per_channel = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int | None = 256,
        scale: float | None = 1.0,
        update_proj_gap: int = 200,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        scale_front: bool = False,
        norm_growth_limit: float | None = 1.01,
        state_bits: int = 32,
        weights: str = "sr",
        seed: int = 0,
        sketch_dtype: torch.dtype | None = None,
    ) -> None:
        self._pool: SketchPool | None = None
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
            scale_front=scale_front,
            norm_growth_limit=norm_growth_limit,
            bias_free_eps=True,
        )
        self.sketch_dtype = sketch_dtype

    def check(self, name: str, shape: tuple[int, ...], group: Group) -> None:
        """The rank must not exceed the smaller side."""
        check_rank(type(self).__name__, group["rank"], name, shape)
        self._pool = None

    def new_state(self, state: State, weight: Tensor, group: Group) -> None:
        """Moments of the sketch, and the norm of the last update."""
        stack, m, n = weight.shape
        rank = resolve_rank(group["rank"], weight.shape)
        shape = (stack, max(m, n), rank)
        new_moment(state, "exp_avg", shape, bits=group["state_bits"], like=weight)
        new_moment(state, "exp_avg_sq", shape, bits=group["state_bits"], like=weight, signed=False)
        state["norm"] = torch.zeros(stack, 1, 1, dtype=computing_dtype(weight.dtype), device=weight.device)

    def projection(self, index: int, shape: tuple[int, ...], group: Group, step: int, like: Tensor) -> Tensor:
        """P [k, r] of matrix `index` at `step` (from 1), in the type of the products."""
        if self._pool is None:
            shapes = [
                (tuple(p.shape), g["rank"])
                for g in self.param_groups
                if g["kind"] == "matrix"
                for p in g["params"]
            ]
            size = max(min(s[-2:]) * resolve_rank(rank, s) for s, rank in shapes)
            self._pool = SketchPool(size, sum(len(g["params"]) for g in self.param_groups))
        rank = resolve_rank(group["rank"], shape)
        return self._pool.projection(
            min(shape[-2:]),
            rank,
            index=index,
            seed=group["seed"],
            refresh=(step - 1) // group["update_proj_gap"],
            device=like.device,
            # One column only reads the gradient: a copy of it in bfloat16 would cost more than it saves.
            dtype=self.sketch_dtype or (fast_dtype(like) if rank > 1 else like.dtype),
        )

    def update(self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]) -> Step:
        """See the module."""
        factors = self.factors(grad, states, group, step, indices)

        def add(target: Tensor, rows: slice) -> None:
            add_rows(target, grad[:, rows], factors[:, rows] if factors.shape[1] > 1 else factors)

        return add

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
        factors = self.factors(grad, states, group, step, indices)
        parts = (tensor.chunk(len(weights)) for tensor in (grad, factors))
        for weight, g, s, index in zip(weights, *parts, indices, strict=True):
            add_scaled(weight, g, s, keep=keep, noise=noise_for(weight, group, step, index))

    def may_look(self, grad: Tensor, group: Group) -> bool:
        """See TwoPassOptimizer: squares are found for the limiter anyway, or by the kernel."""
        return group["norm_growth_limit"] is not None or low_rank_provider(grad) == "triton"

    def look(self, grad: Tensor, group: Group, step: int, indices: list[int]) -> FirstPass:
        """See TwoPassOptimizer."""
        shape = tuple(grad.shape)
        projections = [self.projection(i, shape, group, step, grad) for i in indices]
        projection = torch.stack(projections) if len(projections) > 1 else projections[0].unsqueeze(0)
        return first_pass(grad, projection)

    def factors(
        self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]
    ) -> Tensor:
        """What the gradients [B, m, n] are multiplied by, rate and sign included; the states move on."""
        shape = tuple(grad.shape)
        rank = resolve_rank(group["rank"], shape)
        found = self.looked(indices) or self.look(grad, group, step, indices)
        norm = gather(states, "norm")
        rate, (beta1, beta2) = float(group["lr"]), group["betas"]
        root = sqrt(group["scale"] if group["scale"] is not None else min(shape[-2:]) / rank)
        corrected = rate * sqrt(1 - beta2**step) / (1 - beta1**step)
        # The published order decays after the update; weights are written with decay before it.
        corrected *= 1 - rate * group["weight_decay"]
        betas, eps, clip = group["betas"], group["eps"], self.scale_on(grad)
        rest: dict[str, Any] = {
            "per_channel": self.per_channel,
            "limit": group["norm_growth_limit"],
            "before": root if group["scale_front"] else 1.0,
            "first": step == 1,
            "rate": -corrected * root,
            "grad_scale": clip,
        }
        if is_narrow(states[0]) and low_rank_provider(grad) != "triton":
            sketched = found.projected() if clip is None else found.projected() * clip
            raw = sketched.norm(dim=-1, keepdim=True)
            moved = advance(states, sketched, betas=betas, eps=eps, step=step).norm(dim=-1, keepdim=True)
            factors = factors_of(moved, raw, found.squares.sum(0), norm, **rest)
        else:
            moments = gather(states, "exp_avg"), gather(states, "exp_avg_sq")
            factors = apollo_factors(found, *moments, norm, betas=betas, eps=eps, **rest)
            scatter(states, "exp_avg", moments[0], step)
            scatter(states, "exp_avg_sq", moments[1], step)
        scatter(states, "norm", norm, step)
        return factors if shape[-2] >= shape[-1] else factors.mT


class APOLLOMini(APOLLO):
    """APOLLO-Mini: a sketch of rank 1 and one factor a tensor. State: two numbers a row (or column)."""

    matrix_keys = ("rank", "scale")
    per_channel = False

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, rank: int = 1, scale: float | None = 128.0, **rest: Any
    ):
        super().__init__(params, lr=lr, rank=rank, scale=scale, **rest)
