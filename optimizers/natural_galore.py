"""Natural GaLore (arXiv:2410.16029): GaLore whose projected gradient is preconditioned by its own history.

With 𝒢 the last `history` projected gradients as columns, the present one g = 𝒢 e among them, the natural
gradient of the empirical Fisher matrix is

    (λ I + 𝒢 𝒢ᵀ)⁻¹ g = 𝒢 w,   (λ I + 𝒢ᵀ𝒢) w = e

The paper writes it by Woodbury's identity, g / λ - 𝒢 z / λ²: the same, but a difference of nearly equal
vectors where gradients are large. Adam sees λ 𝒢 w, which is g itself where gradients are small (Adam does not
mind the factor, its ε would). The history belongs to one basis, and starts again with the next. It costs
`history` bfloat16 copies of the projected gradient, ten times GaLore's moments: the paper counts it as
nothing, we count it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import galore
from .cost import Cost
from .galore import GaLore
from .matrix import Group, resolve_rank
from .moments import State

_ELEMENTS = 1 << 16  # of a gradient at a time: what is read in float32 stays small


def state_bytes(shape: tuple[int, ...], config: Any, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state for a matrix: GaLore's, the history in bfloat16, and its Gram matrix in float64.

    The history of float64 weights is float64 too.
    """
    stack, (m, n) = torch.Size(shape[:-2]).numel(), shape[-2:]
    past: int = stack * config.history * max(m, n) * min(resolve_rank(config.rank, shape), m, n)
    width = 8 if dtype == torch.float64 else 2
    return galore.state_bytes(shape, config, dtype) + width * past + 8 * stack * int(config.history) ** 2


def update_cost(shape: tuple[int, ...], config: Any, dtype: torch.dtype) -> Cost:
    """GaLore's, and the history read for a row of its Gram matrix and again for the combination."""
    n, k = torch.Size(shape).numel(), min(shape[-2:])
    past = config.history * (n // k) * min(resolve_rank(config.rank, shape), k)
    return galore.update_cost(shape, config, dtype) + Cost(2 * 2.0 * past)


def natural_gradient(grad: Tensor, history: Tensor, gram: Tensor, place: int, damping: float) -> Tensor:
    """λ (λ I + 𝒢 𝒢ᵀ)⁻¹ g for a stack of flattened gradients [B, d].

    history [B, s, d] and gram = 𝒢ᵀ𝒢 [B, s, s] are changed in place: g takes row `place`. Where the solve
    fails, as with a gradient that is not finite, g comes back unchanged.
    """
    history[:, place] = grad
    rows = torch.zeros(gram.shape[:2], dtype=gram.dtype, device=gram.device)
    parts = [slice(i, i + _ELEMENTS) for i in range(0, grad.shape[1], _ELEMENTS)]
    for part in parts:
        piece = history[:, :, part].to(grad.dtype)
        rows += (piece @ piece[:, place].unsqueeze(-1)).squeeze(-1)
    gram[:, place], gram[:, :, place] = rows, rows
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + damping * eye)
    w = torch.cholesky_solve(eye[place].view(1, -1, 1).expand(len(gram), -1, 1), factor).mul_(damping)
    combined = [w.mT.to(grad.dtype) @ history[:, :, part].to(grad.dtype) for part in parts]
    natural = torch.cat(combined, dim=-1).squeeze(1)
    return torch.where((failed == 0).unsqueeze(-1), natural, grad)


class NaturalGaLore(GaLore):
    """Natural GaLore as a `torch.optim.Optimizer`: GaLore's arguments, `history` and `damping` (λ)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *args: Any,
        history: int = 20,
        damping: float = 1e-3,
        **rest: Any,
    ) -> None:
        if history < 1 or damping <= 0:
            raise ValueError(f"history is {history} and damping {damping}; both must be positive")
        super().__init__(params, lr, *args, history=history, damping=damping, **rest)

    def new_state(self, state: State, weight: Tensor, group: Group) -> None:
        """GaLore's state, the ring of past gradients and its Gram matrix."""
        super().new_state(state, weight, group)
        stack, long, rank = len(weight), max(weight.shape[1:]), resolve_rank(group["rank"], weight.shape)
        exact = torch.float64 if weight.dtype == torch.float64 else torch.bfloat16
        state["history"] = torch.zeros(
            stack, group["history"], long * rank, dtype=exact, device=weight.device
        )
        state["gram"] = torch.zeros(
            stack, group["history"], group["history"], dtype=torch.float64, device=weight.device
        )

    def precondition(self, projected: Tensor, states: list[State], group: Group, step: int) -> Tensor:
        """The natural gradient in place of the gradient."""
        result = torch.empty_like(projected)
        for state, grad, out in zip(
            states, projected.chunk(len(states)), result.chunk(len(states)), strict=True
        ):
            place = (step - 1) % state["history"].shape[1]
            flat = natural_gradient(grad.flatten(1), state["history"], state["gram"], place, group["damping"])
            out.copy_(flat.view(grad.shape))
        return result

    def forget(self, state: State) -> None:
        """The history is written in the coordinates of the old basis."""
        state["history"].zero_()
        state["gram"].zero_()
