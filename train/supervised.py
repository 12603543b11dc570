"""Supervised fine-tuning: cross entropy at the trained positions, and how a model is run on a batch.

The output head never sees a position without a label. Where the model's head is a plain linear layer the loss
works chunk by chunk and the logits are never whole; a model that does more to its logits (softcapping,
scaling, an adapter on the head) keeps its own head and gets `logits_to_keep`. Which of the two is right is
not guessed from the model's name but tried once on a few tokens (`head_is_plain`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..ops import cross_entropy_sum


def loss_metrics(loss_sum: float, trained_tokens: int) -> dict[str, float]:
    """Mean loss per trained token (nats) and its exponential."""
    loss = loss_sum / max(trained_tokens, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def supervised_loss(model: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    """Next-token cross entropy, summed over the trained positions only, in the form that fits the head."""
    return chunked_loss if head_is_plain(model) else own_head_loss


def chunked_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Loss through the backbone's hidden states and a chunked linear cross entropy."""
    head = base_model(model).get_output_embeddings()
    return cross_entropy_sum(trained_hidden(model, batch), head.weight, batch.labels, bias=head.bias)


def own_head_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Loss through the model's own head, at the trained positions only."""
    return nn.functional.cross_entropy(trained_logits(model, batch).float(), batch.labels, reduction="sum")


def trained_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """[n, H]: what the output head would read at the positions that `batch.labels` are predicted from."""
    hidden: Tensor = base_model(model).get_decoder()(**model_inputs(batch)).last_hidden_state
    return hidden.flatten(0, 1)[batch.targets]


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
def head_is_plain(model: nn.Module) -> bool:
    """Whether the model's logits are its head's linear layer and nothing else, tried on eight tokens."""
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
