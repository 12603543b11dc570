"""What every launch of a kernel stands in: Triton launches on the current device, wherever tensors are."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """A context in which the GPU of `tensor` is the current one; on a CPU nothing.

    The current device belongs to a thread and is 0 in a new one: without this, a model on another GPU, or
    one of several, would have its kernels run by the wrong GPU, at addresses that are not its own.
    """
    return torch.cuda.device_of(tensor)
