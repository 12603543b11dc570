"""What goes into a linear output head and makes losses of its logits; `cross_entropy.py` has the formulas."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeadInputs(NamedTuple):
    """z = h W^T + b + u B^T: hidden [N, H], weight [V, H], bias [V]; of an adapter low [N, r], high [V, r].

    Gradients, and whether they are wanted, stand in the same order.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low: Tensor | None
    high: Tensor | None

    def cast(self, dtype: torch.dtype) -> HeadInputs:
        """All but the bias in `dtype`."""
        low = None if self.low is None else self.low.to(dtype)
        high = None if self.high is None else self.high.to(dtype)
        return HeadInputs(self.hidden.to(dtype), self.weight.to(dtype), self.bias, low, high)


class LossSettings(NamedTuple):
    """softcap c, label smoothing e, and the label of positions without one: None where all have one."""

    softcap: float | None
    smoothing: float
    ignore_index: int | None
