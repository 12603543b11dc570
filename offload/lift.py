"""State in host memory, weights on an accelerator: where each segment is updated.

    host     the gradient goes down, the CPU updates float32 state and master weights where they lie, the
             weight in its few bits goes up: 4 bytes a bfloat16 parameter over the link, and any AdamW with
             master weights can
    device   the state goes up, is updated and comes back: 24 bytes a parameter, and every rule can
    split    both at once: each k-th segment goes to the device, where k is one more than the number that the
             CPU finishes in one round trip (the idea of Deep Optimizer States, arXiv:2410.21316)

The CPU's kernel and the accelerator's may differ in the last bit, so with `split`, whose k follows measured
times, two runs need not be equal; with the other two they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor

from .model import gpu_stride
from .segments import Piece
from .steppers import Stepper

Where = Literal["host", "device", "split"]
MEMORY = 0.8
"""Share of the old mean kept when a time is measured anew."""


class Lift:
    """Decides and carries out; `stepper` is that of the optimizer whose weights are on `device`."""

    def __init__(self, stepper: Stepper, device: torch.device, where: Where) -> None:
        self._stepper, self._where = stepper, where
        self._stream = (
            torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        )
        self._device = device
        self._host_seconds: float | None = None
        self._trip_seconds: float | None = None
        self._since = 0

    def goes_to_device(self, pieces: Sequence[Piece]) -> bool:
        """Whether the next segment is updated on the device."""
        if self._where == "device" or not all(self._stepper.can_step_on_host(piece) for piece in pieces):
            return True
        if self._where == "host":
            return False
        self._since += 1
        if self._host_seconds is None:
            return False
        stride = 2 if self._trip_seconds is None else gpu_stride(self._trip_seconds, self._host_seconds)
        if self._since < stride:
            return False
        self._since = 0
        return True

    def on_host(self, piece: Piece, state: dict[str, Tensor]) -> None:
        """Update a piece where its state lies."""
        began = time.perf_counter()
        self._stepper.step_on_host(piece, state)
        self._host_seconds = _mean(self._host_seconds, time.perf_counter() - began)

    def on_device(self, piece: Piece, state: dict[str, Tensor], views: dict[str, Tensor]) -> None:
        """Begin to update a piece on the device; `views`, the moving part of `state`, are changed until
        `finish`.
        """
        with ExitStack() as stack:
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream())
                stack.enter_context(torch.cuda.stream(self._stream))
            moved = {key: view.to(self._device, non_blocking=True, copy=True) for key, view in views.items()}
            state.update(moved)
            self._stepper.step(piece, state)
            for key, view in views.items():
                view.copy_(moved[key], non_blocking=True)

    def finish(self, began: float) -> None:
        """Wait until all that has been begun at `began` (of time.perf_counter) is in the views again."""
        if self._stream is not None:
            self._stream.synchronize()
        self._trip_seconds = _mean(self._trip_seconds, time.perf_counter() - began)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else MEMORY * old + (1 - MEMORY) * new
