"""FRUGAL (arXiv:2411.07837): Adam on a share of every matrix, a rule without state on the rest.

    W ← (1 - η λ) W
    W ← W - η · Adam(active part of G) - η · state_free_scale · sign(rest of G)      (or the rest itself: sgd)

The active part is `density` of G: a run of columns, single entries (`randk`), coordinates in a random or
singular subspace of the smaller side, or whole matrices (`blocks`). Every `update_proj_gap` steps there is
another one; with `reset_statistics` its moments start from zero, the bias correction with them. Which
columns, entries or matrices follows from the seed, so every rank has the same. Density 1 is AdamW, density 0
is sign descent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops.low_rank import add_columns
from ..ops.low_rank_torch import sign_of
from .active import active_shape, columns_of
from .active import seed_of as _seed
from .adamw import adamw_update
from .cost import Cost, state_traffic, weight_traffic
from .galore import basis_bytes, new_basis
from .matrix import Group, gather, matrix_bytes, scatter
from .moments import State, advance, computing_dtype, is_narrow, new_moment
from .products import fast_dtype, multiply
from .subspace import leading_basis, random_basis, tall
from .two_pass import TwoPassOptimizer, noise_for
from .weights import Step

_PROJECTIONS = ("columns", "randk", "random", "svd", "blocks")
_SUBSPACES = ("random", "svd")
_RULES = ("sign_sgd", "sgd", "none")


def state_bytes(
    shape: tuple[int, ...], config: Any, dtype: torch.dtype = torch.float32, *, active: bool = True
) -> int:
    """Bytes of state for a matrix: two moments of its active part, and where it is. active: for `blocks`."""
    full = (torch.Size(shape[:-2]).numel(), *shape[-2:])
    part = active_shape(full, config.density, config.projection)
    elements = torch.Size(part).numel() if active or config.projection != "blocks" else 0
    kept = matrix_bytes(shape, config, dtype, moments=(elements, elements))
    if config.projection == "randk":
        return kept + 4 * elements
    if config.projection in _SUBSPACES:
        return kept + basis_bytes(full[0] * min(full[1:]) * part[2], config.state_bits, dtype)
    return kept


def update_cost(shape: tuple[int, ...], config: Any, dtype: torch.dtype) -> Cost:
    """Moments of the active part; in a subspace three products: into it, and back for both parts."""
    n = torch.Size(shape).numel()
    moved = weight_traffic(n, dtype) + state_traffic(2 * config.density * n, config)
    rank = round(config.density * min(shape[-2:])) if config.projection in _SUBSPACES else 0
    return Cost(moved, 6.0 * n * rank)


def state_free(rest: Tensor, rule: str, scale: Tensor | None = None) -> Tensor:
    """Direction of the part without state, NaN for NaN; scale: what clipping multiplies the gradient by."""
    if rule == "sgd":
        return rest if scale is None else rest * scale
    return sign_of(rest) if rule == "sign_sgd" else torch.zeros_like(rest)


class FRUGAL(TwoPassOptimizer):
    """FRUGAL as a `torch.optim.Optimizer`; see the module, and `MatrixOptimizer` for groups.

    `density`, `projection`, `state_free`, `state_free_scale`, `update_proj_gap`, `betas`, `eps` and
    `weight_decay` may stand in a group. state_free_scale: 1 is published for pre-training, 0.1 for
    fine-tuning.
    """

    matrix_keys = ("density", "rank")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        density: float = 0.25,
        projection: str = "columns",
        state_free: str = "sign_sgd",
        state_free_scale: float = 1.0,
        update_proj_gap: int = 200,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        reset_statistics: bool = True,
        state_bits: int = 32,
        weights: str = "sr",
        seed: int = 0,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        if projection not in _PROJECTIONS:
            raise ValueError(f"projection is {projection!r}; allowed: {', '.join(map(repr, _PROJECTIONS))}")
        if state_free not in _RULES:
            raise ValueError(f"state_free is {state_free!r}; allowed: {', '.join(map(repr, _RULES))}")
        self.product_dtype = product_dtype
        self.steps_alone = projection != "blocks"  # whose state wanders from matrix to matrix
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            state_bits=state_bits,
            weights=weights,
            seed=seed,
            density=density,
            projection=projection,
            state_free=state_free,
            state_free_scale=state_free_scale,
            update_proj_gap=update_proj_gap,
            reset_statistics=reset_statistics,
        )

    def check(self, name: str, shape: tuple[int, ...], group: Group) -> None:
        """The density is a share."""
        if not 0 <= group["density"] <= 1:
            raise ValueError(
                f"FRUGAL: density {group['density']} of the group of {name} is not between 0 and 1"
            )

    def new_state(self, state: State, weight: Tensor, group: Group) -> None:
        """Moments of the active part, its basis or entries; `blocks` gets moments when it is active."""
        shape = active_shape(tuple(weight.shape), group["density"], group["projection"])
        if group["projection"] == "randk":
            state["entries"] = torch.zeros(shape, dtype=torch.int32, device=weight.device)
        if group["projection"] in _SUBSPACES:
            state["basis"] = new_basis(
                (len(weight), min(weight.shape[1:]), shape[2]), group["state_bits"], weight
            )
        if group["projection"] != "blocks":
            self._new_moments(state, shape, weight, group)

    def update(self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]) -> Step:
        """See the module."""
        pairs, period, count = self._begin(grad, states, group, step, indices)
        each = len(grad) // len(states)
        rate = float(group["lr"])
        free, held = -rate * group["state_free_scale"], -rate
        clip = self.scale_on(grad)

        def adam(active: Tensor, state: State) -> Tensor:
            if clip is not None:
                active = active * clip
            if is_narrow(state):
                (beta1, beta2), eps = group["betas"], group["eps"]
                root = (1 - beta2**count) ** -0.5
                # M / (√V root + ε) by what knows no correction
                found = advance([state], active.clone(), betas=(beta1, beta2), eps=eps / root, step=step)
                return found.mul_(held / (root * (1 - beta1**count)))
            exp_avg, exp_avg_sq = gather([state], "exp_avg"), gather([state], "exp_avg_sq")
            direction = adamw_update(
                active, exp_avg, exp_avg_sq, betas=group["betas"], eps=group["eps"], step=count
            )
            scatter([state], "exp_avg", exp_avg, step)
            scatter([state], "exp_avg_sq", exp_avg_sq, step)
            return direction.mul_(held)

        steps = [self._one(part, state, group, period, index, adam, free) for part, state, index in pairs]

        def add(target: Tensor, rows: slice) -> None:
            for one, part in zip(steps, torch.split(target, each), strict=True):
                one(part, rows)

        return add

    def written_by_kernels(self, weights: list[Tensor], grad: Tensor, group: Group) -> bool:
        """See TwoPassOptimizer."""
        return group["projection"] == "columns" and super().written_by_kernels(weights, grad, group)

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
        rate = float(group["lr"])
        pairs, period, count = self._begin(grad, states, group, step, indices)
        for weight, (part, state, index) in zip(weights, pairs, strict=True):
            moments = gather([state], "exp_avg"), gather([state], "exp_avg_sq")
            spans = columns_of(part.shape[2], moments[0].shape[2], _seed(group["seed"], period, index))
            add_columns(
                weight, part, *moments, spans[-1].start, keep=keep, rate=rate,
                free=rate * group["state_free_scale"], rule=group["state_free"], betas=group["betas"],
                eps=group["eps"], step=count, noise=noise_for(weight, group, step, index),
                grad_scale=self.scale_on(grad),
            )  # fmt: skip
            scatter([state], "exp_avg", moments[0], step)
            scatter([state], "exp_avg_sq", moments[1], step)

    def _begin(
        self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]
    ) -> tuple[list[tuple[Tensor, State, int]], int, int]:
        """(gradient, state, index) of each tensor, the period, steps since the moments were zero."""
        since, period = (step - 1) % group["update_proj_gap"], (step - 1) // group["update_proj_gap"]
        pairs = list(zip(grad.chunk(len(states)), states, indices, strict=True))
        if since == 0:
            for part, state, index in pairs:
                self._refresh(part, state, group, period, index, step)
        count = since + 1 if group["reset_statistics"] else step
        return pairs, period, count

    def _one(
        self, grad: Tensor, state: State, group: Group, period: int, index: int,
        adam: Callable[[Tensor, State], Tensor], free: float,
    ) -> Step:  # fmt: skip
        """The step of one matrix [E, m, n]."""
        rule, projection = group["state_free"], group["projection"]
        exact, clip = computing_dtype(grad.dtype), self.scale_on(grad)
        shape = active_shape(tuple(grad.shape), group["density"], projection)
        none = 0 in shape or (projection == "blocks" and "exp_avg" not in state)
        if none:
            return lambda target, rows: _add(target, state_free(grad[:, rows], rule, clip), free)

        if projection == "blocks":
            whole = adam(grad.to(exact), state)
            return lambda target, rows: _add(target, whole[:, rows], 1.0)

        if projection == "columns":
            spans = columns_of(grad.shape[2], shape[2], _seed(group["seed"], period, index))
            active = torch.cat([grad[:, :, span] for span in spans], dim=2).to(exact)
            widths = [span.stop - span.start for span in spans]
            pieces = torch.split(adam(active, state), widths, dim=2)

            def by_columns(target: Tensor, rows: slice) -> None:
                rest = state_free(grad[:, rows].to(target.dtype), rule, clip)
                rest = rest.mul_(free) if rule == "sign_sgd" else rest * free
                for span, piece in zip(spans, pieces, strict=True):
                    rest[:, :, span] = piece[:, rows]
                target.add_(rest)

            return by_columns

        if projection == "randk":
            entries = state["entries"].long()
            direction = adam(grad.flatten(1).gather(1, entries).to(exact), state)
            whole = state_free(grad.to(exact), rule, clip) * free
            whole.flatten(1).scatter_(1, entries, direction)
            return lambda target, rows: _add(target, whole[:, rows], 1.0)

        product = self.product_dtype or fast_dtype(grad)
        basis = state["basis"].to(product)
        upright = tall(grad)
        inside = multiply(upright.to(product), basis)
        direction = adam(inside.to(exact), state)
        # One product back for both: the step and the part of the gradient that has state.
        back = multiply(torch.cat([direction.to(product), inside], dim=-2), basis.mT).to(exact)
        long = upright.shape[1]
        rest = state_free(upright.to(exact) - back[:, long:], rule, clip)
        whole = back[:, :long].add_(rest, alpha=free)
        if grad.shape[-2] < grad.shape[-1]:
            whole = whole.mT
        return lambda target, rows: _add(target, whole[:, rows], 1.0)

    def _refresh(self, grad: Tensor, state: State, group: Group, period: int, index: int, step: int) -> None:
        projection = group["projection"]
        seed = _seed(group["seed"], period, index)
        shape = active_shape(tuple(grad.shape), group["density"], projection)
        if projection == "blocks":
            if self._is_active(group, period, index):
                self._new_moments(state, shape, grad, group)
            else:
                for key in [key for key in state if key.startswith("exp_avg")]:
                    del state[key]  # a block that is not active has no state: that is the saving
            return
        if projection == "randk":
            size = grad.shape[1] * grad.shape[2]
            for e, entries in enumerate(state["entries"]):
                generator = torch.Generator().manual_seed(seed + e)
                entries.copy_(torch.randperm(size, generator=generator)[: shape[1]].sort()[0])
        if projection in _SUBSPACES and shape[2]:
            bases = []
            for e, matrix in enumerate(grad):
                previous = state["basis"][e] if period and projection == "svd" else None
                bases.append(
                    random_basis(min(grad.shape[1:]), shape[2], seed=seed + e, like=grad)
                    if projection == "random"
                    else leading_basis(matrix, previous, shape[2], seed=seed + e, exact=False)
                )
            state["basis"].copy_(torch.stack(bases))
        if group["reset_statistics"]:
            for key in ("exp_avg", "exp_avg_sq"):
                scatter([state], key, torch.zeros_like(gather([state], key)), step)

    def _is_active(self, group: Group, period: int, index: int) -> bool:
        """Whether matrix `index` is among the round(density · matrices) active ones of this period."""
        places = [self._place(p)[0] for g in self.param_groups if g["kind"] == "matrix" for p in g["params"]]
        generator = torch.Generator().manual_seed(_seed(group["seed"], period, 0))
        order = torch.randperm(len(places), generator=generator)
        return places.index(index) in order[: round(group["density"] * len(places))].tolist()

    @staticmethod
    def _new_moments(state: State, shape: tuple[int, ...], like: Tensor, group: Group) -> None:
        bits = group["state_bits"]
        new_moment(state, "exp_avg", shape, bits=bits, like=like)
        new_moment(state, "exp_avg_sq", shape, bits=bits, like=like, signed=False)


def _add(target: Tensor, direction: Tensor, factor: float) -> None:
    target.add_(direction, alpha=factor)
