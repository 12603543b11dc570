"""Sample answers: what the model says to a few held-out prompts, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data import prompt_ids
from ..models import plain_attention
from .objectives import base_model

Messages = list[dict[str, str]]


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int,
    max_seconds: float | None = None,
) -> list[str]:
    """Greedy answers to chat prompts, through the same template as in training.

    `max_seconds` bounds the whole call: what has been said until then is returned.
    """
    if not prompts:
        return []
    base: Any = base_model(model)
    ids = [prompt_ids(tokenizer, messages) for messages in prompts]
    longest = max(len(row) for row in ids)
    input_ids = torch.zeros(len(ids), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, tokens in enumerate(ids):  # padded on the left, so that every answer starts at the same column
        input_ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    device = base.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    with plain_attention(base):
        output = base.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]  # has no annotations
                do_sample=False,
                max_new_tokens=max_new_tokens,
                max_time=max_seconds,
                eos_token_id=stop_ids(tokenizer),
                pad_token_id=stop_ids(tokenizer)[0],
                bos_token_id=tokenizer.bos_token_id,
            ),
        )
    model.train(was_training)
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)).strip() for row in output]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: eos, and the usual end-of-turn marks where the vocabulary has them."""
    vocabulary = tokenizer.get_vocab()
    marks = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
    ids = {vocabulary[mark] for mark in marks if mark in vocabulary}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids) or [0]
