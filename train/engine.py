"""The native engine: one process, or data parallel through Accelerate.

Four calls (`forward_backward`, `step`, `state_dict`, `load_state_dict`) are all that the loop knows of an
engine, so that another one can stand behind the same loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..checkpoint import load_optimizer_state, optimizer_state
from ..data import Batch
from ..ops import FreedMemory
from ..optimizers import clip_by_global_norm
from .objectives import LossModule


class Interrupted(Exception):
    """A signal came between two micro-batches; nothing of the step has been applied."""


@dataclass
class NativeEngine:
    """Gradients of one optimizer step, exactly those of the one big batch.

    Losses are summed and divided by the trained tokens of the whole step over all processes, so neither
    accumulation nor the number of processes changes the result (transformers #34191, #37766 show the
    mean-of-means mistake).
    """

    accelerator: Accelerator
    loss_module: LossModule
    optimizer: torch.optim.Optimizer
    autocast: bool
    freed: FreedMemory = field(default_factory=FreedMemory)

    def __post_init__(self) -> None:
        distributed = self.accelerator.num_processes > 1
        self.forward: nn.Module = (
            self.accelerator.prepare_model(self.loss_module) if distributed else self.loss_module
        )
        self.parameters = {
            name: p for name, p in self.loss_module.model.named_parameters() if p.requires_grad
        }

    def forward_backward(
        self, batches: Sequence[Batch], trained_tokens: int, interrupted: Callable[[], bool]
    ) -> Tensor:
        """Accumulate the gradient of one step; returns the loss sum over all processes (float32 scalar).

        Raises Interrupted (gradients dropped) when `interrupted()` turns true between micro-batches.
        """
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        scale = self.accelerator.num_processes / trained_tokens
        for number, batch in enumerate(batches):
            if interrupted():
                self.optimizer.zero_grad(set_to_none=True)
                raise Interrupted
            last = number == len(batches) - 1
            sync = contextlib.nullcontext() if last else self.accelerator.no_sync(self.forward)
            with sync:
                with self.precision():
                    loss = self.forward(batch.to(device))
                (loss * scale).backward()
            total += loss.detach()
        reduced: Tensor = self.accelerator.reduce(total, reduction="sum")
        return reduced

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """bf16 autocast where the weights are float32 and the recipe does not ask for float32 arithmetic."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    def step(self, max_grad_norm: float | None) -> Tensor:
        """Clip by the global norm and apply; returns the norm before clipping. Skips a non-finite one."""
        norm = clip_by_global_norm(list(self.parameters.values()), max_grad_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.freed.after_step()
        return norm

    def state_dict(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by file name, and JSON: the trained weights and the optimizer's state."""
        tensors, settings = optimizer_state(self.optimizer, self.parameters)
        weights = {name: p.detach() for name, p in self.parameters.items()}
        return {"trained": weights, "optimizer": tensors}, {"optimizer": settings}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, dict[str, Tensor]], settings: dict[str, Any]) -> None:
        """Restore what state_dict gave, bit for bit."""
        weights = tensors["trained"]
        if weights.keys() != self.parameters.keys():
            odd = sorted(weights.keys() ^ self.parameters.keys())
            raise ValueError(f"the checkpoint's trained parameters differ from the model's: {odd[:4]}")
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        load_optimizer_state(self.optimizer, self.parameters, tensors["optimizer"], settings["optimizer"])
