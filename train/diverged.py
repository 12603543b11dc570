"""Which layer and which batch made the loss or a gradient non-finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data import Batch
from ..optimizers.in_backward import measure_in_backward
from .engine import NativeEngine


def find_culprit(engine: NativeEngine, batches: Sequence[Batch]) -> str:
    """One line: the first module whose output (or the first parameter whose gradient) is not finite.

    Runs the step's micro-batches once more, watched by hooks, unless that step has changed weights. Costs
    one step, once, at the end of a run that has failed; no gradient outlives its look.
    """
    model = engine.loss_module.model
    half_stepped = engine.half_stepped()
    if half_stepped is not None:
        return f"first non-finite gradient: {half_stepped}, in the batch of training rows {_rows(batches[0])}"
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the weight {name} is not finite"
    for batch in batches:
        rows = _rows(batch)
        engine.optimizer.zero_grad(set_to_none=True)
        module_name, loss = _watched_forward(engine, batch)
        if module_name is not None:
            return f"first non-finite output: {module_name}, in the batch of training rows {rows}"
        if not bool(torch.isfinite(loss)):
            return f"first non-finite value: the loss itself, in the batch of training rows {rows}"
        with measure_in_backward(engine.parameters.values()) as seen:
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        for name, parameter in engine.parameters.items():
            if parameter is seen.broken:
                return f"first non-finite gradient: {name}, in the batch of training rows {rows}"
    return "not found again on a second pass over the step's rows"


def _rows(batch: Batch) -> str:
    return ", ".join(str(row) for row in batch.rows[:8]) + (" ..." if len(batch.rows) > 8 else "")


def _watched_forward(engine: NativeEngine, batch: Batch) -> tuple[str | None, Tensor]:
    found: list[str] = []

    def watch(name: str) -> object:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in engine.loss_module.model.named_modules()
        if name
    ]
    try:
        with engine.precision():
            loss = engine.loss_module(batch.to(engine.accelerator.device))
    finally:
        for handle in handles:
            handle.remove()
    return (found[0] if found else None), loss
