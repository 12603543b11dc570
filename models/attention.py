"""Which attention code a model runs: sdpa, or the packed one that keeps the rows of one sequence apart.

Whether an architecture can be packed is not looked up but tried: a tiny random model of the same class, two
rows in one sequence, against each row alone. That covers sliding windows, soft caps, state-space layers that
would leak from row to row, and code that never asks transformers' attention interface.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .facts import ModelFacts
from .quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PACKED = "shoestring"
_ROWS = (7, 11)
_TOLERANCE = 1e-3  # of the largest logit; float32 against eager attention gives some 1e-6
_VISIBLE = 1e-2  # what attention across the rows must change at least, or the trial proves nothing
_REASONS: dict[str, str] = {}  # by configuration: one trial a model and process; empty where packing is exact


def supports_packing(facts: ModelFacts) -> bool:
    """Whether several rows may share a sequence, found out on a tiny model of the same class; cached."""
    return not why_not_packed(facts.config)


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Switch `model` to the packed attention where that is exact for its architecture; say whether it was."""
    if why_not_packed(model.config):
        return False
    _register()
    model.set_attn_implementation(PACKED)
    return True


def why_not_packed(config: PretrainedConfig) -> str:
    """Why rows of this model may not share a sequence, in a few words; empty where they may."""
    key = config.to_json_string()
    if key not in _REASONS:
        try:
            _REASONS[key] = _trial(_shrink(config))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            # the class cannot be made small, or refuses the implementation or the extra argument
            _REASONS[key] = f"{config.model_type} refuses: {str(error).splitlines()[0][:80]}"
    return _REASONS[key]


@contextmanager
def plain_attention(model: torch.nn.Module, implementation: str = "sdpa") -> Iterator[None]:
    """Run `model` (a PEFT wrapper too) with transformers' own attention, as generation needs."""
    wrapped: Any = model
    inner = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    before = inner.config._attn_implementation
    if before != PACKED:
        yield
        return
    inner.set_attn_implementation(implementation)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def _register() -> None:
    from ..ops.attention import register

    register()


def _trial(config: PretrainedConfig) -> str:
    """Two rows packed into one sequence against each row alone under eager attention, on random weights."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # untyped in transformers
    _register()
    with torch.random.fork_rng(devices=[]), quiet_libraries(), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the usual start is so small that attention hardly shows in the logits
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
        rows = [torch.randint(3, 64, (1, length)) for length in _ROWS]
        joined = torch.cat(rows, dim=1)
        positions = torch.cat([torch.arange(length) for length in _ROWS])[None]
        alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
        mixed = model(input_ids=joined, use_cache=False).logits
        model.set_attn_implementation(PACKED)
        packed = model(
            input_ids=joined,
            position_ids=positions,
            segments=(0, _ROWS[0], sum(_ROWS)),
            use_cache=False,
        ).logits
    scale = alone.abs().max()
    if (mixed - alone).abs().max() <= _VISIBLE * scale:
        return f"{config.model_type}: a trial on random weights showed nothing"
    error = float((packed - alone).abs().max() / scale)
    return "" if error <= _TOLERANCE else f"{config.model_type} lets rows see each other ({error:.0e})"


def _shrink(config: PretrainedConfig) -> PretrainedConfig:
    """A small copy, with windows short enough to matter.

    Raises:
        ValueError: the configuration does not say its sizes in the usual words.
    """
    small = copy.deepcopy(config)
    heads = getattr(small, "num_attention_heads", None)
    if small.get_text_config() is not small or not isinstance(heads, int):
        raise ValueError("its configuration is not that of a plain decoder")
    grouped = getattr(small, "num_key_value_heads", None)
    kinds = getattr(small, "layer_types", None)
    # one layer of each kind, two at least
    kept = [*dict.fromkeys(kinds), *kinds][: max(2, len(set(kinds)))] if kinds else []
    sizes = {
        "num_hidden_layers": len(kept) or 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 64,
        "sliding_window": 4,
        "attention_chunk_size": 4,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    for name, size in sizes.items():
        derived = isinstance(getattr(type(small), name, None), property)
        if isinstance(getattr(small, name, None), int) and not derived:
            setattr(small, name, size)
    if kept:
        small.layer_types = kept
    if isinstance(grouped, int):
        small.num_key_value_heads = 4 if grouped == heads else 2 if grouped > 1 else 1
    rope = getattr(small, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") == "longrope":  # its lists fit one head size only
        small.rope_parameters = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 1e4)}
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    return small
