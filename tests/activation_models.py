"""Small decoders of four layers, batches for them, and their gradients: for the tests of activations."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from shoestring.adapters import attach
from shoestring.models.facts import build_skeleton
from shoestring.ops import use_fused
from shoestring.ops.attention import NAME, register
from shoestring.recipes.choices import LoraAdapter
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = 4


def llama(
    *, dtype: torch.dtype = torch.float32, packed: bool = False, fused: bool = True, **changes: Any
) -> Any:
    """A whole model to train; `changes` are of its configuration."""
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": LAYERS, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).to(dtype).train()
    if packed:
        register()
        model.set_attn_implementation(NAME)
    if fused:
        use_fused(model)
    return model


def with_lora(
    *, dtype: torch.dtype = torch.float32, packed: bool = False, fused: bool = True, dropout: float = 0.0
) -> Any:
    """The same inside PEFT, with adapters that no longer start at zero."""
    base = llama(dtype=dtype, packed=packed, fused=False)
    config = base.config
    facts: Any = SimpleNamespace(
        source="org/small", tied=False, parameters=0, skeleton=lambda: build_skeleton(config)
    )
    model = attach(base, LoraAdapter(r=4, lora_dropout=dropout), facts, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if fused:
        use_fused(model)
    return model.train()


def batch(length: int = 24, *, packed: bool = False, seed: int = 0) -> dict[str, Any]:
    """Two padded rows, or three packed into one sequence, as the model's forward takes them."""
    draw = torch.Generator().manual_seed(seed)
    if not packed:
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length - 3 :] = 0
        ids = torch.randint(50, (2, length), generator=draw)
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    bounds = (0, length // 4, length // 2, length)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[None]
    ids = torch.randint(50, (1, length), generator=draw)
    return {"input_ids": ids, "position_ids": positions, "segments": bounds, "use_cache": False}


def loss_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Some function of all logits, in float32 at least."""
    logits = model(**inputs).logits
    loss: Tensor = (logits if logits.dtype == torch.float64 else logits.float()).square().mean()
    return loss


def gradients(model: nn.Module, *batches: dict[str, Any]) -> list[Tensor]:
    """Of the batches' losses, one backward pass each, accumulated; dropout draws the same every time."""
    torch.manual_seed(2)
    model.zero_grad(set_to_none=True)
    for inputs in batches:
        loss_of(model, inputs).backward()
    return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]


def same_bits(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether both are the same tensors, and there are any, not all zero."""
    assert len(some) == len(others) > 0
    assert all(bool(one.any()) for one in others)
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


class LateLink:
    """A link whose copies happen in order, at the latest moment that is allowed: a busy stream."""

    ahead = True

    def __init__(self) -> None:
        self.queue: deque[tuple[object, Callable[[], object]]] = deque()
        self.sent = 0

    def send(self, source: Tensor, buffer: Tensor) -> None:
        self.sent += 1
        self.queue.append((None, lambda: buffer.copy_(source)))

    def settle(self) -> None:
        """The queue holds the sources."""

    def fetch(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, object]:
        target, ticket = torch.full_like(buffer, 255, device=device), object()
        self.queue.append((ticket, lambda: target.copy_(buffer)))
        return target, ticket

    def wait(self, ticket: object) -> None:
        while any(queued is ticket for queued, _ in self.queue):
            self.queue.popleft()[1]()
