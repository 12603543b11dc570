"""Held-out loss: sums only, never all logits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data import TokenRows, eval_batches
from .engine import NativeEngine, loss_and_sums


@dataclass(frozen=True)
class EvalResult:
    """One evaluation: metrics over `trained_tokens` held-out tokens, in `seconds`.

    comparable_loss: over the rows that every evaluation of the run measures. whole: whether all rows that
    were asked for were measured, not those alone.
    """

    metrics: dict[str, float]
    comparable_loss: float
    trained_tokens: int
    rows: int
    seconds: float
    whole: bool = True

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
    rest_fits: Callable[[float, float], bool] = lambda taken, rest: True,
) -> EvalResult:
    """The objective's metrics on `rows`, shared among the processes.

    The first `compared` rows are also scored alone, so that a measurement of few rows between the ends and
    one of all rows at the end can be compared. The others are left out where `rest_fits` says so of the
    seconds that the first ones took and of those that they would take by that; the main process decides.
    Forward only, in micro-batches no larger than training's: evaluating never needs more memory than training
    did.
    """
    began = time.monotonic()
    objective = engine.loss_module.objective
    limits = {"micro_tokens": micro_tokens, "micro_rows": micro_rows, "packed": packed}
    head = rows.part(0, min(compared, len(rows)))
    tail = rows.part(len(head), len(rows))
    with engine.averaged():
        first = _sums(engine, accelerator, head, limits)
        taken = time.monotonic() - began
        whole = not len(tail) or not len(head) or rest_fits(taken, taken * _tokens(tail) / _tokens(head))
        whole = bool(gather_object([whole])[0])
        rest = _sums(engine, accelerator, tail, limits) if whole else {}
    both = {name: first.get(name, 0.0) + rest.get(name, 0.0) for name in {**first, **rest}}

    def metrics(sums: dict[str, float]) -> dict[str, float]:
        others = {name: value for name, value in sums.items() if name not in ("loss", "tokens", "rows")}
        count = sums["tokens"] if objective.per == "token" else sums["rows"]
        return objective.metrics(sums["loss"], int(count), **others)

    return EvalResult(
        metrics=metrics(both),
        comparable_loss=metrics(first)["loss"],
        trained_tokens=int(both["tokens"]),
        rows=len(rows) if whole else len(head),
        seconds=time.monotonic() - began,
        whole=whole,
    )


def _tokens(rows: TokenRows) -> float:
    return float(rows.lengths.sum())


@torch.no_grad()
def _sums(
    engine: NativeEngine, accelerator: Accelerator, rows: TokenRows, limits: dict[str, Any]
) -> dict[str, float]:
    """Sums over rows and processes: "loss", "tokens", "rows", and what the objective adds to them."""
    module = engine.loss_module
    packed = limits["packed"]
    was_training = module.training
    module.eval()
    sums = {"loss": 0.0, "tokens": 0.0, "rows": 0.0}
    batches = eval_batches(rows, **limits)
    for indices in batches[accelerator.process_index :: accelerator.num_processes]:
        batch = module.objective.collate(rows, indices, packed=packed).to(accelerator.device)
        if len(batch.labels) == 0:
            continue
        with engine.precision():
            loss, others = loss_and_sums(module(batch))
        for name, value in {"loss": loss, **others}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        sums["tokens"] += len(batch.labels)
        sums["rows"] += len(batch.rows)
    module.train(was_training)
    every = gather_object([sums])
    return {name: sum(one.get(name, 0.0) for one in every) for one in every for name in one}
