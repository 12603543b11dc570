"""What is minimised: an Objective is three functions, collate, loss and metrics.

A user's own objective is `objective: module:name` in the recipe, where `name` is anything with these
attributes (this dataclass, a module, a class):

    collate(rows: TokenRows, indices: list[int], *, packed: bool) -> Batch
    loss(model: nn.Module, batch: Batch) -> Tensor     # the SUM of losses, float32 scalar
                                          or (Tensor, {name: Tensor})    # and sums to measure by, detached
    metrics(loss_sum: float, count: int, **sums: float) -> dict[str, float]      # must contain "loss"
    per = "token" (if left out) or "row"               # what is counted: batch.labels, or batch.rows
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ..data import Batch, collate
from ..recipes import DistillObjective, DpoObjective, ObjectiveConfig, SftObjective, SftThenDpoObjective
from ..recipes.errors import UserError
from .distill import distillation_loss, distillation_metrics
from .dpo import Reference, preference_loss, preference_metrics, reference_kind
from .supervised import (
    base_model,
    chunked_loss,
    loss_metrics,
    model_inputs,
    own_head_loss,
    supervised_loss,
    trained_hidden,
    trained_logits,
)

if TYPE_CHECKING:
    from ..recipes import AdapterConfig
    from .teacher import Teacher

__all__ = [
    "Loss",
    "LossModule",
    "Objective",
    "base_model",
    "build_objective",
    "chunked_loss",
    "loss_metrics",
    "model_inputs",
    "own_head_loss",
    "supervised_loss",
    "trained_hidden",
    "trained_logits",
]

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]
"""The sum to minimise, alone or with further sums."""
_PER = ("token", "row")


@dataclass(frozen=True)
class Objective:
    """Three functions; see the module's docstring."""

    collate: Callable[..., Batch]
    loss: Callable[[nn.Module, Batch], Loss]
    metrics: Callable[..., dict[str, float]]
    per: Literal["token", "row"] = "token"
    """What the summed loss of a step is divided by: its trained tokens, or its rows (a pair is one)."""
    reference: Reference | None = None
    """The model that training on pairs starts from; its state belongs into checkpoints."""


class LossModule(nn.Module):
    """The model with its loss inside, so that data parallelism wraps one forward that returns the sums."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def release(self) -> nn.Module:
        """The model, which is not held here any more: whoever takes it can free it."""
        model, self.model = self.model, nn.Module()
        return model

    def forward(self, batch: Batch) -> Loss:
        """Sum of the batch's losses, float32 scalar; with further sums where the objective has some."""
        return self.objective.loss(self.model, batch)


def build_objective(
    config: ObjectiveConfig,
    model: nn.Module,
    *,
    adapter: AdapterConfig | None = None,
    teacher: Teacher | None = None,
) -> Objective:
    """The objective that a recipe names, for a model that is ready to train.

    adapter: the recipe's, which decides on dpo's reference where the recipe does not. teacher: for distill,
    what `open_teacher` gave. The reference of dpo is not set: call `objective.reference.set(model)` when
    training on pairs begins, or load its state.

    Raises UserError when `module:name` cannot be imported or lacks one of the three functions, when the
    reference cannot be what the recipe says, and for sft_then_dpo, which is two objectives in a row.
    """
    if isinstance(config, SftObjective):
        return Objective(collate=collate, loss=supervised_loss(model), metrics=loss_metrics)
    if isinstance(config, DpoObjective):
        reference = Reference(reference_kind(config, adapter), model)
        loss = preference_loss(model, config, reference)
        return Objective(collate, loss, preference_metrics, per="row", reference=reference)
    if isinstance(config, DistillObjective):
        if teacher is None:
            raise ValueError("distill needs a teacher: open_teacher(...)")
        loss = distillation_loss(model, config, teacher)
        return Objective(collate=teacher.collate, loss=loss, metrics=distillation_metrics)
    if isinstance(config, SftThenDpoObjective):
        raise ValueError("sft_then_dpo is two objectives, each with rows of its own: build them one by one")
    return _users_own(config.name)


def _users_own(path: str) -> Objective:
    module_name, _, attribute = path.partition(":")
    if str(Path.cwd()) not in sys.path:  # last: a file here must not hide an installed package
        sys.path.append(str(Path.cwd()))
    try:
        holder = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"objective: {path} cannot be imported: {error}\n"
            "  It must be module:name, with the module in this folder or on PYTHONPATH.  "
            f"Try: python -c 'import {module_name}'"
        ) from error
    missing = [name for name in ("collate", "loss", "metrics") if not callable(getattr(holder, name, None))]
    if missing:
        raise UserError(
            f"objective: {path} has no function {', '.join(missing)}.\n"
            "  An objective is three functions: collate, loss, metrics; see shoestring.train.objectives."
        )
    per: Any = getattr(holder, "per", "token")
    if per not in _PER:
        raise UserError(
            f"objective: {path} has per={per!r}; allowed: token, row.\n"
            "  It says what the summed loss is divided by: the trained tokens, or the rows, of a step."
        )
    return Objective(collate=holder.collate, loss=holder.loss, metrics=holder.metrics, per=per)
