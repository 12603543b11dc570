"""What APOLLO, GaLore and FRUGAL share where the kernels of `ops/low_rank.py` write the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import low_rank
from ..ops.rounding import noise_key, noise_start
from .matrix import Group, MatrixOptimizer

# Elements from which on a matrix is stepped alone: stacked with others its gradient would be copied first,
# which is more traffic than the step. Smaller ones are stacked, since a launch costs more than they do.
_ALONE = 1 << 22


class TwoPassOptimizer(MatrixOptimizer):
    """A `MatrixOptimizer` whose `update_weights` may write the weights itself, and then returns no step."""

    def _advance_batch(self, group: Group, params: list[Tensor]) -> None:
        apart = len(params) > 1 and params[0].numel() >= _ALONE
        if apart and params[0].grad is not None and low_rank.provider(params[0].grad) == "triton":
            for p in params:
                super()._advance_batch(group, [p])
        else:
            super()._advance_batch(group, params)


def written_by_kernels(weights: list[Tensor], grad: Tensor, group: Group) -> bool:
    """Whether the kernels are to write these weights: not where something is kept beside each of them."""
    narrow = weights[0].dtype in (torch.bfloat16, torch.float16)
    if narrow and group["weights"] not in ("sr", "plain"):
        return False
    return low_rank.provider(grad, *weights) == "triton"


def noise_for(weight: Tensor, group: Group, step: int, index: int) -> low_rank.Noise | None:
    """Where the random bits of tensor `index` at `step` are, as `noise_window` has them; None to nearest."""
    if weight.dtype != torch.bfloat16 or group["weights"] != "sr":
        return None
    return noise_key(group["seed"], step), noise_start(index)
