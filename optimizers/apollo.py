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

from .cost import Cost, state_traffic, weight_traffic
from .matrix import Group, MatrixOptimizer, check_rank, gather, matrix_bytes, resolve_rank, scatter
from .moments import State, computing_dtype, new_moment
from .products import fast_dtype, multiply
from .sketch import SketchPool
from .subspace import tall
from .weights import Step

_CPU_ELEMENTS = 1 << 20
# Up to this rank a sketch only reads the gradient; a copy of it in bfloat16 would cost more than it saves.
_THIN = 8


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


def sketch(grad: Tensor, projection: Tensor) -> Tensor:
    """The smaller side of grad [B, m, n] projected by [B or 1, k, r]: [B, l, r], l the larger side."""
    return multiply(tall(grad.to(projection.dtype)), projection.expand(len(grad), -1, -1))


def apollo_update(
    sketched: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor]:
    """(norms of N, norms of R) of each channel, [B, l, 1]; both moments [B, l, r] are changed in place."""
    exp_avg.lerp_(sketched, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(sketched, sketched, value=1 - betas[1])
    scaled = exp_avg_sq.sqrt().add_(eps)
    torch.div(exp_avg, scaled, out=scaled)
    return _norm(scaled, (-1,)), _norm(sketched, (-1,))


def limit_growth(norm: Tensor, previous: Tensor, limit: float, first: bool) -> tuple[Tensor, Tensor]:
    """(factor of the update, norm to remember), each [B, 1, 1]: growth is kept to `limit` times a step."""
    if first:
        return torch.ones_like(norm), norm
    factor = limit / torch.clamp(norm / (previous + 1e-8), min=limit)
    return factor, norm * factor


class APOLLO(MatrixOptimizer):
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
            dtype=self.sketch_dtype or (fast_dtype(like) if rank > _THIN else like.dtype),
        )

    def update(self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]) -> Step:
        """See the module."""
        m, n = grad.shape[-2:]
        rank = resolve_rank(group["rank"], tuple(grad.shape))
        compute = states[0]["norm"].dtype
        projections = [self.projection(i, tuple(grad.shape), group, step, grad) for i in indices]
        projection = torch.stack(projections)
        exp_avg, exp_avg_sq = gather(states, "exp_avg"), gather(states, "exp_avg_sq")
        sketched = sketch(grad, projection).to(compute)
        pairs = [
            apollo_update(
                sketched[:, part],
                exp_avg[:, part],
                exp_avg_sq[:, part],
                betas=group["betas"],
                eps=group["eps"],
            )
            for part in _slices(max(m, n), grad.shape[0] * rank, grad.device)
        ]
        scatter(states, "exp_avg", exp_avg, step)
        scatter(states, "exp_avg_sq", exp_avg_sq, step)
        scaled, raw = (torch.cat(norms, dim=1) for norms in zip(*pairs, strict=True))
        if not self.per_channel:
            scaled, raw = _norm(scaled, (-2,)), _norm(raw, (-2,))
        factors = scaled / (raw + 1e-8)
        if m < n:
            factors = factors.mT

        root = sqrt(group["scale"] if group["scale"] is not None else min(m, n) / rank)
        limit = group["norm_growth_limit"]
        if limit is not None:
            before = root if group["scale_front"] else 1.0
            norm = scaled_norm(grad, factors).mul_(before)
            factor, kept = limit_growth(norm, gather(states, "norm"), limit, step == 1)
            scatter(states, "norm", kept, step)
            factors = factors * factor
        rate, (beta1, beta2) = float(group["lr"]), group["betas"]
        corrected = rate * sqrt(1 - beta2**step) / (1 - beta1**step)
        # The published order decays after the update; `add_step` decays before it.
        corrected *= 1 - rate * group["weight_decay"]
        factors = factors.mul(-corrected * root)

        def add(target: Tensor, rows: slice) -> None:
            target.addcmul_(grad[:, rows], factors[:, rows] if factors.shape[1] > 1 else factors)

        return add


class APOLLOMini(APOLLO):
    """APOLLO-Mini: a sketch of rank 1 and one factor a tensor. State: two numbers a row (or column)."""

    matrix_keys = ("rank", "scale")
    per_channel = False

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, rank: int = 1, scale: float | None = 128.0, **rest: Any
    ):
        super().__init__(params, lr=lr, rank=rank, scale=scale, **rest)


def scaled_norm(grad: Tensor, factors: Tensor) -> Tensor:
    """Norm of grad · factors for each matrix, [B, 1, 1], without holding the product."""
    if factors.shape[-1] == 1:
        return _norm(_norm(grad, (-1,), factors.dtype) * factors, (-2, -1))
    if grad.device.type != "cpu":
        columns = _norm(grad, (-2,), factors.dtype)
        return _norm(columns * factors, (-2, -1))
    # Norms over columns walk against the grain of memory on a CPU: a few rows at a time stay in cache.
    rows = _slices(grad.shape[1], grad.shape[0] * grad.shape[2], grad.device)
    parts = [_norm(grad[:, part] * factors, (-2, -1)) for part in rows]
    return _norm(torch.cat(parts, dim=1), (-2, -1))


def _slices(length: int, width: int, device: torch.device) -> list[slice]:
    """Parts of `length` rows of `width` elements: what a CPU's cache holds, all at once elsewhere."""
    size = max(1, _CPU_ELEMENTS // width) if device.type == "cpu" else length
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _norm(value: Tensor, over: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(value, dim=over, keepdim=True, dtype=dtype)
    return result
