"""A shallow copy of the model: the same layers, few of them, with random weights, built as for the run."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..adapters import attach
from ..models.attention import use_packed_attention
from ..models.facts import ModelFacts, build_skeleton
from ..models.quiet import quiet_libraries
from ..ops import use_fused, use_wta_crs
from ..recipes import LoraAdapter, Recipe

# The embedding is a table look-up and the head is measured apart, so the copy needs few words.
VOCABULARY = 512


def build_replica(
    recipe: Recipe,
    facts: ModelFacts,
    layers: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool,
    checkpointing: bool,
) -> nn.Module:
    """The model of `recipe` with `layers` decoder layers, adapter attached and ready to train."""
    config = shallow(facts.config, layers)
    model = _with_random_weights(config, recipe, facts, device, dtype)
    if packed:
        use_packed_attention(model)
    adapter = recipe.adapter
    if adapter is not None:
        # Where the adapter starts costs neither bytes nor seconds, and layer numbers mean nothing here.
        changes: dict[str, Any] = {"layers_to_transform": None}
        if isinstance(adapter, LoraAdapter):
            changes |= {"init_lora_weights": True, "rank_pattern": {}, "rank_allocation": "uniform"}
        adapter = adapter.model_copy(update=changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT misses a name on the hub; nothing is saved
        trained: nn.Module = attach(
            model, adapter, _facts_of(facts, config, model, layers), seed=0, from_weights=False
        )
    if recipe.train.fused_ops:
        use_fused(trained)
    if recipe.train.wta_crs_ratio is not None:
        use_wta_crs(trained, recipe.train.wta_crs_ratio)
    if checkpointing:
        base: Any = trained.get_base_model() if hasattr(trained, "get_base_model") else trained  # type: ignore[operator]
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return trained.train()


def shallow(config: Any, layers: int) -> Any:
    """`config` with `layers` decoder layers and a small vocabulary."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    text.vocab_size = VOCABULARY
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    return config


def _with_random_weights(
    config: Any, recipe: Recipe, facts: ModelFacts, device: torch.device, dtype: torch.dtype
) -> Any:
    skeleton = build_skeleton(config, facts.trust_remote_code)
    # One small block of noise, repeated: values of the usual size, without minutes of random numbers.
    block = torch.randn(1 << 16).mul_(0.02).to(dtype)
    state = {}
    for name, parameter in skeleton.named_parameters():
        if parameter.dim() < 2:
            state[name] = torch.ones(parameter.shape, dtype=dtype)
        else:
            repeats = -(-parameter.numel() // len(block))
            state[name] = block.repeat(repeats)[: parameter.numel()].view(parameter.shape)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": recipe.model.attn_implementation or "sdpa",
        "device_map": None if device.type == "cpu" else {"": device},
    }
    if recipe.model.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.model.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=recipe.model.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    with quiet_libraries():
        return type(skeleton).from_pretrained(None, config=config, state_dict=state, **options)


def _facts_of(facts: ModelFacts, config: Any, model: Any, layers: int) -> ModelFacts:
    """The facts that `attach` reads, true of the copy."""
    shapes = tuple((name, tuple(value.shape)) for name, value in model.named_parameters())
    return replace(facts, config=config, layers=layers, vocab_size=VOCABULARY, parameter_shapes=shapes)
