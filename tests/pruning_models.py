"""Tiny random decoder models of every family that pruning knows, and calibration tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
# `head_dim` is given where its default is another; windows are shorter than the sequences below.
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}


def tiny(family: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0, **given: Any) -> Any:
    """A causal model in evaluation mode; every parameter, norms and biases too, is random."""
    text = "Text" if family == "gemma3_text" else ""
    config = getattr(transformers, f"{NAMES[family]}{text}Config")(**{**SHAPE, **OWN[family], **given})
    model = getattr(transformers, f"{NAMES[family]}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 2:
                values /= parameter.shape[1] ** 0.5
            elif "norm" in name:
                values = (0.0 if "gemma" in family else 1.0) + 0.2 * values
            else:
                values *= 0.2
            parameter.copy_(values)
    for parameter in model.parameters():  # and no buffers: loaded models have rotations of float32
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def batches(count: int = 3, *, length: int = 10, seed: int = 0) -> list[torch.Tensor]:
    """Token ids; the last batch is shorter and smaller than the others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, length)] * (count - 1) + [(2, length - 3)]
    return [torch.randint(SHAPE["vocab_size"], shape, generator=generator) for shape in shapes]


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Of all positions of fixed tokens."""
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=batches(seed=9)[0] if ids is None else ids).logits
    return result
