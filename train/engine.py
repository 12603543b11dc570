"""The native engine: one process, or data parallel through Accelerate.

Four calls (`forward_backward`, `step`, `state_dict`, `load_state_dict`) are all that the loop knows of an
engine, so that another one can stand behind the same loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..checkpoint import load_optimizer_state, optimizer_state
from ..data import Batch
from ..offload import Stored, in_memory
from ..offload.streamed_model import StreamedModel
from ..ops import FreedMemory, Int8Weight, dense_weights, make_dense
from ..ops.int8_weight import from_plain, to_plain
from ..optimizers import clip_for_step
from ..optimizers.badam import BAdam
from ..optimizers.from_libraries import averaged_weights, end_at_averaged_weights
from ..optimizers.in_backward import BackwardPass, BackwardStepper
from .objectives import LossModule


def loss_and_sums(result: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """What an objective's loss gives: the sum to minimise, and further sums to measure by."""
    return result if isinstance(result, tuple) else (result, {})


class Interrupted(Exception):
    """A signal came between two micro-batches; nothing of the step has been applied."""


@dataclass
class NativeEngine:
    """Gradients of one optimizer step, exactly those of the one big batch.

    Losses are summed and divided by the trained tokens (or rows) of the whole step over all processes, so
    neither accumulation nor the number of processes changes the result (transformers #34191, #37766 show the
    mean-of-means mistake).
    """

    accelerator: Accelerator
    loss_module: LossModule
    optimizer: torch.optim.Optimizer
    autocast: bool
    freed: FreedMemory = field(default_factory=FreedMemory)
    stepper: BackwardStepper | None = None
    """Steps inside the backward pass, where a step has one micro-batch: with more, all gradients are held
    until the last one anyway, and the ordinary step clips exactly and applies all or nothing."""
    streamed: StreamedModel | None = None
    """Holds the layers' weights where they are not on the device."""
    in_backward: BackwardPass | None = field(default=None, init=False)
    """What the last `forward_backward` has stepped already, if it has."""
    rehearsing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        distributed = self.accelerator.num_processes > 1
        self.forward: nn.Module = (
            self.accelerator.prepare_model(self.loss_module) if distributed else self.loss_module
        )
        self.find_parameters()

    def find_parameters(self) -> None:
        """Look up what is trained: now, and again whenever the model has been given other parameters."""
        # BAdam trains tensors that require no gradient at the moment.
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self.parameters = {
            name: p
            for name, p in self.loss_module.model.named_parameters()
            if p.requires_grad or id(p) in own
        }

    def forward_backward(
        self, batches: Sequence[Batch], count: int, interrupted: Callable[[], bool]
    ) -> Tensor:
        """Accumulate the gradient of one step; returns the loss sum over all processes (float32 scalar).

        count: what the summed loss is divided by: trained tokens, or rows, of the step in all processes.

        With a `stepper` and one micro-batch, the weights are stepped on the way. Raises Interrupted
        (gradients dropped, nothing stepped) when `interrupted()` turns true between micro-batches.
        """
        device = self.accelerator.device
        self.in_backward = None
        total = torch.zeros((), device=device)
        scale = self.accelerator.num_processes / count
        for number, batch in enumerate(batches):
            if interrupted():
                self.optimizer.zero_grad(set_to_none=True)
                raise Interrupted
            if self.stepper is not None and len(batches) == 1:
                return self._step_in_backward(self.stepper, batch.to(device), scale)
            last = number == len(batches) - 1
            sync = contextlib.nullcontext() if last else self.accelerator.no_sync(self.forward)
            with sync:
                with self.precision():
                    loss, _ = loss_and_sums(self.forward(batch.to(device)))
                (loss * scale).backward()
            total += loss.detach()
        reduced: Tensor = self.accelerator.reduce(total, reduction="sum")
        return reduced

    def _step_in_backward(self, stepper: BackwardStepper, batch: Batch, scale: float) -> Tensor:
        total = torch.zeros((), device=self.accelerator.device)

        def scaled() -> Tensor:
            with self.precision():
                loss, _ = loss_and_sums(self.forward(batch))
            total.copy_(loss.detach())
            return loss * scale

        if self.rehearsing:
            stepper.measure(scaled)
        else:
            self.in_backward = stepper.step(scaled)
        return total

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, forward_backward changes no weight and no state of the optimizer, stepper or not."""
        self.rehearsing = True
        try:
            yield
        finally:
            self.rehearsing = False

    def half_stepped(self) -> str | None:
        """The weight whose gradient was not finite when others had been stepped in the same backward pass."""
        done = self.in_backward
        if done is None or not done.stepped:
            return None
        return next((name for name, p in self.parameters.items() if p is done.broken), None)

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """bf16 autocast where the weights are float32 and the recipe does not ask for float32 arithmetic."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    def step(self, max_grad_norm: float | None) -> Tensor:
        """Clip by the global norm and apply; returns the norm before clipping. Skips a non-finite one.

        Where forward_backward has stepped already, as the stepper was told to clip, it only returns the norm.
        """
        if self.in_backward is not None:
            self.freed.after_step()
            return torch.tensor(self.in_backward.norm, dtype=torch.float64)
        # The norm of what is trained now: under DDP the other blocks have gradients too.
        if isinstance(self.optimizer, BAdam):
            trained = self.optimizer.active_parameters()
        else:
            trained = list(self.parameters.values())
        norm = clip_for_step(self.optimizer, trained, max_grad_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.stepper is not None:
                self.stepper.remember(float(norm))
        self.freed.after_step()
        return norm

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the weights to measure; for most optimizers those it trains."""
        return averaged_weights(self.optimizer)

    @contextlib.contextmanager
    def writable(self) -> Iterator[None]:
        """Inside, the model has the weights to measure, in dense tensors that `save_pretrained` can write."""
        with self.averaged(), dense_weights(self.loss_module.model):
            yield

    def end_training(self) -> None:
        """Give the model the weights to export, for good: they may be merged and cast in place."""
        end_at_averaged_weights(self.optimizer)
        make_dense(self.loss_module.model)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors by file name, and JSON: the trained weights and the optimizer's state."""
        tensors, settings = optimizer_state(self.optimizer, self.parameters)
        weights: dict[str, Tensor | Stored] = {}
        for name, p in self.parameters.items():
            if isinstance(p, Int8Weight):
                weights.update(to_plain(name, p))
            else:
                away = None if self.streamed is None else self.streamed.stored(p)
                weights[name] = p.detach() if away is None else away
        return {"trained": weights, "optimizer": tensors}, {"optimizer": settings}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        """Restore what state_dict gave, bit for bit."""
        weights = dict(tensors["trained"])
        if self.streamed is None:
            weights = {name: in_memory(value) for name, value in weights.items()}
        for name, p in self.parameters.items():
            if isinstance(p, Int8Weight) and f"{name}.codes" in weights:
                weights[name] = from_plain(name, weights)
                for key in to_plain(name, p):
                    del weights[key]
        if weights.keys() != self.parameters.keys():
            odd = sorted(weights.keys() ^ self.parameters.keys())
            raise ValueError(f"the checkpoint's trained parameters differ from the model's: {odd[:4]}")
        if self.streamed is not None:
            self.streamed.load({p: weights[name] for name, p in self.parameters.items()})
        for name, parameter in self.parameters.items():
            if self.streamed is None or self.streamed.stored(parameter) is None:
                parameter.copy_(in_memory(weights[name]))
        load_optimizer_state(self.optimizer, self.parameters, tensors["optimizer"], settings["optimizer"])
        if isinstance(self.optimizer, BAdam):
            self.optimizer.activate()
