"""Adapters through PEFT, its own and ours: attach, count, save, load, merge.

Importing this makes PEFT know SVFit and SoKA, so that it loads what was saved of them.
"""

from .attach import adapter_lines, attach, frozen_factors, looks_at_rows, on_meta, trainable_parameters
from .lora import lora_config, targeted_modules
from .merge import compare_logits, merge_in_place, merge_layers
from .soka import SokaConfig
from .storage import adapter_config, load_adapter_state, save_adapter
from .svfit import SvfitConfig, reading_lora, save_as_lora

__all__ = [
    "SokaConfig",
    "SvfitConfig",
    "adapter_config",
    "adapter_lines",
    "attach",
    "compare_logits",
    "frozen_factors",
    "load_adapter_state",
    "looks_at_rows",
    "lora_config",
    "merge_in_place",
    "merge_layers",
    "on_meta",
    "reading_lora",
    "save_adapter",
    "save_as_lora",
    "targeted_modules",
    "trainable_parameters",
]
