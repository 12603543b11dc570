"""Swap a model's modules for fast ones that compute the same: the one place where that is decided.

An instance changes its class to a subclass; names, parameters, hooks and saved files stay as they were, and
no class of transformers or PEFT is altered.
"""

from __future__ import annotations

from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from .lora import FusedLoraLinear


def use_fused(model: nn.Module) -> list[str]:
    """Swap in the fast modules where they are exact; one line for the log for each kind swapped.

    Call it after the adapters are attached. Harmless when repeated.
    """
    lines = []
    count = 0
    for module in model.modules():
        if type(module) is PeftLinear:
            module.__class__ = FusedLoraLinear
            count += 1
    if count:
        lines.append(f"{count} LoRA layers: base and adapter in one operation")
    return lines
