"""AdaLomo (arXiv:2310.10195): LOMO with Adafactor's second moment, a step for each tensor by its own size.

    β2 = 1 - t^-0.8
    r ← β2 r + (1 - β2) mean over each row of (G² + 1e-30),   c likewise over each column
    U = G √(mean(r) / r) / √c,   divided by max(1, RMS(U) / clip_threshold)
    η' = η max(1e-3, RMS(W)),    W ← (1 - η' λ) W - η' U

U's size is bounded by its own root mean square ("grouped update normalisation"), so the gradient needs no
clipping. A vector is a matrix of one row, for which the rule is that of the whole second moment. State: a
number a row and one a column, always float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .matrix import Group, MatrixOptimizer, gather, matrix_bytes, scatter
from .moments import State, computing_dtype
from .weights import Step

_TINY = 1e-30
_SMALLEST_RMS = 1e-3
# Elements whose squares are held at a time.
_CPU_ELEMENTS = 1 << 18
_CUDA_ELEMENTS = 1 << 26


def state_bytes(shape: tuple[int, ...], config: Any, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state for a tensor: a number a row and one a column, the step, and what `weights` keeps."""
    n = shape[-1] if shape else 1
    stack = shape[0] if len(shape) == 3 else 1
    rows = torch.Size(shape).numel() // (stack * n)
    return matrix_bytes(shape, config, dtype, full=stack * (rows + n))


def adalomo_update(
    grad: Tensor, row: Tensor, column: Tensor, *, beta2: float, clip_threshold: float
) -> tuple[Tensor, Tensor]:
    """Factors of the rows [B, m, 1] and of the columns [B, 1, n] that make grad [B, m, n] the update U.

    row and column, the running means of the same shapes, are changed in place.
    """
    compute, (m, n) = row.dtype, grad.shape[-2:]
    parts = _slices(grad)
    squares_of_rows, squares_of_columns = [], torch.zeros_like(column)
    for part in parts:
        square = grad[:, part].to(compute).square()
        squares_of_rows.append(square.mean(-1, keepdim=True))
        squares_of_columns += square.sum(-2, keepdim=True)
    row.lerp_(torch.cat(squares_of_rows, dim=1).add_(_TINY), 1 - beta2)
    column.lerp_(squares_of_columns.div_(m).add_(_TINY), 1 - beta2)
    of_rows = (row / row.mean(-2, keepdim=True)).rsqrt_()
    of_columns = column.rsqrt()
    energy = [(grad[:, part].to(compute) * of_columns).square_().sum(-1, keepdim=True) for part in parts]
    mean_square = (torch.cat(energy, dim=1) * of_rows.square()).sum(-2, keepdim=True) / (m * n)
    of_rows.div_((mean_square.sqrt_() / clip_threshold).clamp_(min=1.0))
    return of_rows, of_columns


class AdaLOMO(MatrixOptimizer):
    """AdaLomo as a `torch.optim.Optimizer` for tensors of all shapes; see the module, and `MatrixOptimizer`.

    `clip_threshold`, `beta2_decay` and `weight_decay` may stand in a group. state_bits has nothing to act on:
    the state is float32.
    """

    matrix_keys = ("clip_threshold",)
    every_tensor = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        clip_threshold: float = 1.0,
        beta2_decay: float = -0.8,
        state_bits: int = 32,
        weights: str = "sr",
        seed: int = 0,
    ) -> None:
        if not clip_threshold > 0:
            raise ValueError(f"clip_threshold is {clip_threshold}; it must be positive")
        super().__init__(
            params,
            lr=lr,
            betas=(0.0, 0.0),
            eps=_TINY,
            weight_decay=weight_decay,
            state_bits=state_bits,
            weights=weights,
            seed=seed,
            clip_threshold=clip_threshold,
            beta2_decay=beta2_decay,
        )

    def new_state(self, state: State, weight: Tensor, group: Group) -> None:
        """The running means of the squares of rows and columns."""
        stack, m, n = weight.shape
        dtype, device = computing_dtype(weight.dtype), weight.device
        state["row"] = torch.zeros(stack, m, 1, dtype=dtype, device=device)
        state["column"] = torch.zeros(stack, 1, n, dtype=dtype, device=device)

    def update_weights(
        self,
        weights: list[Tensor],
        grad: Tensor,
        states: list[State],
        group: Group,
        step: int,
        indices: list[int],
    ) -> tuple[Step, float]:
        """See the module. Decay goes with the update: its rate differs from tensor to tensor."""
        row, column = gather(states, "row"), gather(states, "column")
        of_rows, of_columns = adalomo_update(
            grad, row, column, beta2=1 - step ** group["beta2_decay"], clip_threshold=group["clip_threshold"]
        )
        scatter(states, "row", row, step)
        scatter(states, "column", column, step)
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        norm = torch.linalg.vector_norm(whole, dim=(-2, -1), keepdim=True, dtype=row.dtype)
        size = norm.div_((whole.shape[-2] * whole.shape[-1]) ** 0.5).clamp_(min=_SMALLEST_RMS)
        rate = size.mul_(-float(group["lr"]))
        of_rows = of_rows * rate
        decay = group["weight_decay"]

        def add(target: Tensor, rows: slice) -> None:
            if decay:
                target.addcmul_(whole[:, rows].to(target.dtype), rate * decay)
            target.addcmul_(grad[:, rows] * of_columns, of_rows[:, rows])

        return add, 1.0


def _slices(grad: Tensor) -> list[slice]:
    """Rows of grad [B, m, n] whose squares are taken at a time."""
    most = _CPU_ELEMENTS if grad.device.type == "cpu" else _CUDA_ELEMENTS
    size = max(1, most // (grad.shape[0] * grad.shape[2]))
    return [slice(first, min(first + size, grad.shape[1])) for first in range(0, grad.shape[1], size)]
