"""Supervised fine-tuning: cross entropy at the trained positions, and how a model is run on a batch.

The output head never sees a position without a label. Where the model's head is a linear layer, alone, with a
LoRA adapter, or as PEFT's trained copy, and a softcap at most follows, the loss works chunk by chunk and the
logits are never whole; a model that does more to its logits keeps its own head and gets `logits_to_keep`.
Which of the two is right is not guessed from a name but tried once on a few tokens (`head_is_linear`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..ops import cross_entropy_sum
from ..ops.autocast import computing_dtype
from ..ops.lora import Projection


def loss_metrics(loss_sum: float, trained_tokens: int) -> dict[str, float]:
    """Mean loss per trained token (nats) and its exponential."""
    loss = loss_sum / max(trained_tokens, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def supervised_loss(model: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    """Next-token cross entropy, summed over the trained positions only, in the form that fits the head."""
    return chunked_loss if head_is_linear(model) else own_head_loss


def chunked_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Loss through the backbone's hidden states and a chunked linear cross entropy."""
    head = linear_head(model)
    if head is None:  # what it was when it was tried it is not now: an adapter is off, or another one is on
        return own_head_loss(model, batch)
    hidden = trained_hidden(model, batch)
    return cross_entropy_sum(
        hidden,
        head.weight,
        batch.labels,
        bias=head.bias,
        softcap=_softcap(model),
        ignore_index=None,
        low_rank=_low_rank(head, hidden),
    )


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


def linear_head(model: nn.Module) -> Projection | None:
    """What the output head computes now, where it is a linear layer or plain LoRA on one, else None."""
    head = base_model(model).get_output_embeddings()
    if type(head) is nn.Linear:
        return Projection(head.weight, head.bias, None, None)
    from peft.utils import ModulesToSaveWrapper

    from ..ops.lora_layers import projection_of

    if isinstance(head, ModulesToSaveWrapper):
        names = head.active_adapters
        if head.disable_adapters:
            head = head.original_module
        elif len(names) == 1 and names[0] in head.modules_to_save:
            head = head.modules_to_save[names[0]]
        return Projection(head.weight, head.bias, None, None) if type(head) is nn.Linear else None
    found = projection_of(head)
    return None if found is None or found.state is not None else found


def _low_rank(head: Projection, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the head's adapter adds to the logits, as the two factors of a product."""
    if head.a is None or head.b is None:
        return None
    dtype = computing_dtype(hidden)
    x = nn.functional.dropout(hidden.to(dtype), head.dropout)
    return x @ head.a.to(dtype).t() * head.scaling, head.b


def _softcap(model: nn.Module) -> float | None:
    """Gemma 2's, by its name in the configuration; whether the model obeys it is tried."""
    config = getattr(base_model(model), "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    return getattr(text, "final_logit_softcapping", None)


@torch.no_grad()
def head_is_linear(model: nn.Module) -> bool:
    """Whether the model's logits are what `chunked_loss` takes them for, tried on eight tokens."""
    head = linear_head(model)
    if head is None:
        return False

    without_dropout, softcap = replace(head, dropout=0.0), _softcap(model)

    def ours(hidden: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, head.weight, head.bias)
        if low_rank := _low_rank(without_dropout, hidden):
            logits = logits + low_rank[0] @ low_rank[1].to(low_rank[0].dtype).t()
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    # PEFT's copies are float32 on a base in half precision, which autocast alone can run
    halves = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    mixed = bool(halves) and head.weight.dtype == torch.float32
    with torch.autocast(head.weight.device.type, next(iter(halves), None), enabled=mixed):
        return _gives_the_logits(model, head.weight, ours)


@torch.no_grad()
def head_is_plain(model: nn.Module) -> bool:
    """Whether the model's logits are its head's linear layer and nothing else, tried on eight tokens."""
    head = base_model(model).get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    return _gives_the_logits(model, head.weight, head)


def _gives_the_logits(model: nn.Module, weight: Tensor, head: Callable[[Tensor], Tensor]) -> bool:
    """Whether `head` makes the model's logits of its last hidden states, on eight tokens."""
    device = weight.device
    ids = torch.arange(1, 9, device=device).remainder(weight.shape[0]).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = base_model(model).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = head(hidden).float()
    finally:
        model.train(was_training)
    return torch.allclose(logits, ours, rtol=1e-2, atol=1e-2)
