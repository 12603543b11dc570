"""Held-out loss: sums only, never all logits."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ..data import TokenRows, eval_batches
from .engine import NativeEngine


@dataclass(frozen=True)
class EvalResult:
    """One evaluation: metrics over `trained_tokens` held-out tokens, in `seconds`."""

    metrics: dict[str, float]
    trained_tokens: int
    rows: int
    seconds: float

    @property
    def loss(self) -> float:
        """Mean loss per trained token."""
        return self.metrics["loss"]


@torch.no_grad()
def evaluate(
    engine: NativeEngine, accelerator: Accelerator, rows: TokenRows, *, micro_tokens: int, packed: bool
) -> EvalResult:
    """The objective's metrics on `rows`, shared among the processes.

    Forward only, in micro-batches no larger than training's, so that evaluating never needs more memory
    than training did.
    """
    began = time.monotonic()
    objective = engine.loss_module.objective
    module = engine.loss_module
    was_training = module.training
    module.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    mine = eval_batches(rows, micro_tokens=micro_tokens, packed=packed)
    for indices in mine[accelerator.process_index :: accelerator.num_processes]:
        batch = objective.collate(rows, indices, packed=packed).to(accelerator.device)
        if len(batch.labels) == 0:
            continue
        with engine.precision():
            sums[0] += module(batch).double()
        sums[1] += len(batch.labels)
    module.train(was_training)
    loss_sum, count = (float(value) for value in accelerator.reduce(sums, reduction="sum"))
    return EvalResult(
        objective.metrics(loss_sum, int(count)), int(count), len(rows), time.monotonic() - began
    )
