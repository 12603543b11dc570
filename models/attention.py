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
_TOLERANCE = 2e-4  # float32, two small layers, against eager attention


def supports_packing(facts: ModelFacts) -> bool:
    """Whether several rows may share a sequence, found out on a tiny model of the same class; cached."""
    return _packs(facts.config)


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Switch `model` to the packed attention where that is exact for its architecture; say whether it was."""
    if not _packs(model.config):
        return False
    _register()
    model.set_attn_implementation(PACKED)
    return True


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


_PACKS: dict[str, bool] = {}  # by the configuration: one trial for each model in a process


def _packs(config: PretrainedConfig) -> bool:
    key = config.to_json_string()
    if key not in _PACKS:
        small = _shrink(config)
        _PACKS[key] = small is not None and packing_is_exact(small)
    return _PACKS[key]


def packing_is_exact(config: PretrainedConfig) -> bool:
    """Compare two rows packed into one sequence with each row alone under eager attention, on random weights.

    `config` is of a model small enough to build here.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # untyped in transformers
    _register()
    with torch.random.fork_rng(devices=[]), quiet_libraries(), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        rows = [torch.randint(3, 64, (1, length)) for length in _ROWS]
        alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
        try:
            model.set_attn_implementation(PACKED)
            packed = model(
                input_ids=torch.cat(rows, dim=1),
                position_ids=torch.cat([torch.arange(length) for length in _ROWS])[None],
                segments=(0, _ROWS[0], sum(_ROWS)),
                use_cache=False,
            ).logits
        except (TypeError, ValueError, KeyError, NotImplementedError):
            return False  # the class refuses the implementation, the positions or the extra argument
    return bool((packed - alone).abs().max() <= _TOLERANCE * alone.abs().max().clamp(min=1.0))


def _shrink(config: PretrainedConfig) -> PretrainedConfig | None:
    """A small copy, its sliding window short enough to matter; None when its sizes are unknown."""
    small = copy.deepcopy(config)
    heads = getattr(small, "num_attention_heads", None)
    layers = getattr(small, "num_hidden_layers", None)
    if small.get_text_config() is not small or not isinstance(heads, int) or not isinstance(layers, int):
        return None
    kinds = getattr(small, "layer_types", None)
    if kinds:  # one layer of each kind, two at least
        kept = [*dict.fromkeys(kinds), *kinds][: max(2, len(set(kinds)))]
        small.layer_types = kept
        small.num_hidden_layers = len(kept)
    else:
        small.num_hidden_layers = 2
    grouped = getattr(small, "num_key_value_heads", None)
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 64,
    }
    for name, size in sizes.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, size)
    if isinstance(grouped, int):
        small.num_key_value_heads = 4 if grouped == heads else 2 if grouped > 1 else 1
    if isinstance(getattr(small, "sliding_window", None), int):
        small.sliding_window = 4
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    return small
