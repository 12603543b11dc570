"""Q-APOLLO (arXiv:2412.05270, section 5.4): APOLLO on weights that are held in int8.

The rule is APOLLO's; a weight is decoded to float32, changed, and encoded again with stochastic rounding, so
that updates far below a code's width arrive on average. Gradients have the weight's outward type. Which
weights are int8 is the model's business (`shoestring.ops.use_int8_weights`); dense ones are treated as by
APOLLO.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Int8Weight
from ..ops.rounding import noise_window
from .apollo import APOLLO
from .matrix import Group
from .moments import State

_UNIT = 1 / (1 << 16)


class QAPOLLO(APOLLO):
    """APOLLO for models with `Int8Weight` parameters; arguments as APOLLO's. `weights` is for dense ones."""

    def _advance_batch(self, group: Group, params: list[Tensor]) -> None:
        dense = [p for p in params if not isinstance(p, Int8Weight)]
        if dense:
            super()._advance_batch(group, dense)
        for p in params:
            if isinstance(p, Int8Weight):
                self._advance_int8(group, p, self.state[p])

    def _advance_int8(self, group: Group, p: Int8Weight, state: State) -> None:
        assert p.grad is not None
        state["step"] += 1
        step, index = int(state["step"]), self._place(p)[0]
        change = self.update(p.grad.unsqueeze(0), [state], group, step, [index])
        value = p.dequantise(torch.float32)
        value.mul_(1 - float(group["lr"]) * group["weight_decay"])
        change(value.unsqueeze(0), slice(0, len(value)))
        noise = self._noise_of(p, group)

        def draw(part: slice) -> Tensor:
            return noise_window(noise, part.start, part.stop - part.start, value.device) * _UNIT

        p.requantise_(value, draw)


def int8_bytes(shape: tuple[int, ...], group_size: int) -> int:
    """Bytes of an int8 weight: a code each, and a scale and a zero point for each group."""
    elements = torch.Size(shape).numel()
    return elements + 5 * -(-elements // group_size)
