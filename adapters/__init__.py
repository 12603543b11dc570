"""Adapters of the LoRA family through PEFT: attach, count, save, load, merge."""

from .lora import attach, lora_config, targeted_modules, trainable_parameters
from .merge import compare_logits, merge_in_place, merge_layers
from .storage import adapter_config, load_adapter_state, save_adapter

__all__ = [
    "adapter_config",
    "attach",
    "compare_logits",
    "load_adapter_state",
    "lora_config",
    "merge_in_place",
    "merge_layers",
    "save_adapter",
    "targeted_modules",
    "trainable_parameters",
]
