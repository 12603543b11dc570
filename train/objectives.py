"""What is minimised: an Objective is three functions, collate, loss and metrics.

A user's own objective is `objective: module:name` in the recipe, where `name` is anything with these
three attributes (this dataclass, a module, a class):

    collate(rows: TokenRows, indices: list[int], *, packed: bool) -> Batch
    loss(model: nn.Module, batch: Batch) -> Tensor     # the SUM of losses over batch.labels, float32 scalar
    metrics(loss_sum: float, trained_tokens: int) -> dict[str, float]      # must contain "loss"
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch, collate
from ..ops import cross_entropy_sum
from ..recipes import ObjectiveConfig
from ..recipes.errors import UserError


@dataclass(frozen=True)
class Objective:
    """Three functions; see the module's docstring."""

    collate: Callable[..., Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    metrics: Callable[[float, int], dict[str, float]]


class LossModule(nn.Module):
    """The model with its loss inside, so that data parallelism wraps one forward that returns one scalar."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the batch's losses, float32 scalar."""
        return self.objective.loss(self.model, batch)


def build_objective(config: ObjectiveConfig, model: nn.Module) -> Objective:
    """The objective that a recipe names.

    Raises UserError when `module:name` cannot be imported or lacks one of the three functions.
    """
    if config.name == "sft":
        return Objective(collate=collate, loss=supervised_loss(model), metrics=loss_metrics)
    return _users_own(config.name)


def loss_metrics(loss_sum: float, trained_tokens: int) -> dict[str, float]:
    """Mean loss per trained token (nats) and its exponential."""
    loss = loss_sum / max(trained_tokens, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def supervised_loss(model: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    """Next-token cross entropy, summed over the trained positions only.

    The output head never sees a position without a label. Where the model's head is a plain linear layer
    the loss works chunk by chunk and the logits are never whole; a model that does more to its logits
    (softcapping, scaling, an adapter on the head) keeps its own head and gets `logits_to_keep`. Which of
    the two is right is not guessed from the model's name but tried once on a few tokens.
    """
    return chunked_loss if _head_is_plain(model) else own_head_loss


def chunked_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Loss through the backbone's hidden states and a chunked linear cross entropy."""
    base = base_model(model)
    output = base.get_decoder()(**model_inputs(batch))
    hidden = output.last_hidden_state.flatten(0, 1)[batch.targets]
    head = base.get_output_embeddings()
    return cross_entropy_sum(hidden, head.weight, batch.labels, bias=head.bias)


def own_head_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Loss through the model's own head, at the trained positions only."""
    return nn.functional.cross_entropy(trained_logits(model, batch).float(), batch.labels, reduction="sum")


def trained_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[n, vocabulary]: the model's own logits for each of `batch.labels`, whose n positions alone it scores.

    Of padded rows the head sees the positions at which any of them is trained.
    """
    if batch.input_ids.shape[0] == 1:
        logits: Tensor = model(**model_inputs(batch), logits_to_keep=batch.targets).logits
        return logits[0]
    length = batch.input_ids.shape[1]
    keep = torch.unique(batch.targets % length)
    column = torch.searchsorted(keep, batch.targets % length)
    logits = model(**model_inputs(batch), logits_to_keep=keep).logits
    return logits[batch.targets // length, column]


def model_inputs(batch: Batch) -> dict[str, object]:
    """The keyword arguments with which a transformers model runs this batch."""
    inputs: dict[str, object] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if batch.segments is not None:
        inputs["segments"] = batch.segments
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    return inputs


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper (its layers still carry the adapters)."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


@torch.no_grad()
def _head_is_plain(model: nn.Module) -> bool:
    base = base_model(model)
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    device = head.weight.device
    ids = torch.arange(1, 9, device=device).remainder(head.weight.shape[0]).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = head(hidden).float()
    finally:
        model.train(was_training)
    return torch.allclose(logits, ours, rtol=1e-2, atol=1e-2)


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
    return Objective(collate=holder.collate, loss=holder.loss, metrics=holder.metrics)
