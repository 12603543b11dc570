"""Small models, steps and disks for the tests of streamed weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from shoestring.offload.streamed_weights import stream_layers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(layers: int = 5, **changes: Any) -> LlamaConfig:
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**sizes, **changes})


def llama(dtype: torch.dtype = torch.float32, layers: int = 5, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config(layers, **changes)).to(dtype).train()


def with_lora(model: nn.Module, dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    adapted: Any = get_peft_model(model, LoraConfig(r=3, lora_dropout=dropout, target_modules=TARGETS))
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.1
    return adapted


def streamed(model: nn.Module, folder: Path, tier: str = "disk", **options: Any):
    return stream_layers(model, tier=tier, folder=folder if tier == "disk" else None, io="threads", **options)


def rows(step: int, count: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 50, (count, length), generator=torch.Generator().manual_seed(100 + step))


def loss_of(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class SlowStore:
    """A store whose reads and writes take their time, each another, and which can be told to fail."""

    def __init__(self, store: Any, *, delay: float = 0.0) -> None:
        self.store, self.delay, self.calls = store, delay, 0
        self.fail: dict[str, Exception] = {}
        self.log: list[tuple[str, int]] = []

    def _pass(self, verb: str, offset: int) -> None:
        self.calls += 1
        time.sleep(self.delay * (1 + self.calls % 3))
        self.log.append((verb, offset))
        if verb in self.fail:
            raise self.fail[verb]

    def read(self, offset: int, into: Tensor) -> None:
        self._pass("read", offset)
        self.store.read(offset, into)

    def write(self, offset: int, data: Tensor) -> None:
        self._pass("write", offset)
        self.store.write(offset, data)
