"""What is kept beside a narrow weight, for each way in which an update enters it (`ops/writing.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.writing import Mode, Step, add_step
from .moments import State

__all__ = ["Mode", "Step", "add_step", "prepare", "weight_bytes"]


def weight_bytes(elements: int, mode: Mode, dtype: torch.dtype) -> int:
    """Bytes of state that `mode` adds for `elements` weights of `dtype`."""
    if dtype not in (torch.bfloat16, torch.float16):
        return 0
    return elements * {"sr": 0, "plain": 0, "kahan": 2, "master": 4}[mode]


def prepare(state: State, weight: Tensor, mode: Mode) -> None:
    """Put into `state` what `mode` keeps beside the weight."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return
    if mode == "kahan":
        state["compensation"] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    elif mode == "master":
        state["master"] = weight.detach().float().contiguous()
