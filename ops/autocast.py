"""The type in which an operation computes, with torch.autocast obeyed."""

from __future__ import annotations

import torch
from torch import Tensor


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """autocast's type for the tensor's device while autocast is on (float64 is left alone), else its own."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype
