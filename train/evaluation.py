"""Held-out loss: sums only, never all logits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..data import TokenRows, eval_batches
from .engine import NativeEngine


@dataclass(frozen=True)
class EvalResult:
    """One evaluation: metrics over `trained_tokens` held-out tokens, in `seconds`.

    comparable_loss: over the rows that every evaluation of the run measures.
    """

    metrics: dict[str, float]
    comparable_loss: float
    trained_tokens: int
    rows: int
    seconds: float

    @property
    def loss(self) -> float:
        """Mean loss per trained token."""
        return self.metrics["loss"]


def evaluate(
    engine: NativeEngine,
    accelerator: Accelerator,
    rows: TokenRows,
    *,
    compared: int,
    micro_tokens: int,
    micro_rows: int | None,
    packed: bool,
) -> EvalResult:
    """The objective's metrics on `rows`, shared among the processes.

    The first `compared` rows are also scored alone, so that a measurement of few rows between the ends and
    one of all rows at the end can be compared. Forward only, in micro-batches no larger than training's:
    evaluating never needs more memory than training did.
    """
    began = time.monotonic()
    metrics = engine.loss_module.objective.metrics
    limits = {"micro_tokens": micro_tokens, "micro_rows": micro_rows, "packed": packed}
    with engine.averaged():
        first = _sums(engine, accelerator, rows.part(0, min(compared, len(rows))), limits)
        rest = _sums(engine, accelerator, rows.part(min(compared, len(rows)), len(rows)), limits)
    loss_sum, count = first[0] + rest[0], first[1] + rest[1]
    return EvalResult(
        metrics=metrics(loss_sum, count),
        comparable_loss=metrics(*first)["loss"],
        trained_tokens=count,
        rows=len(rows),
        seconds=time.monotonic() - began,
    )


@torch.no_grad()
def _sums(
    engine: NativeEngine, accelerator: Accelerator, rows: TokenRows, limits: dict[str, Any]
) -> tuple[float, int]:
    module = engine.loss_module
    packed = limits["packed"]
    was_training = module.training
    module.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    batches = eval_batches(rows, **limits)
    for indices in batches[accelerator.process_index :: accelerator.num_processes]:
        batch = module.objective.collate(rows, indices, packed=packed).to(accelerator.device)
        if len(batch.labels) == 0:
            continue
        with engine.precision():
            sums[0] += module(batch).double()
        sums[1] += len(batch.labels)
    module.train(was_training)
    loss_sum, count = accelerator.reduce(sums, reduction="sum").tolist()
    return loss_sum, int(count)
