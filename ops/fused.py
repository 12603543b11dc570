"""Swap a model's modules for fast ones that compute the same: the one place where that is decided.

A module qualifies by its structure and is then tried: old and new forward on the same input, on the module's
own weights. An instance changes its class to a subclass made here; names, parameters, hooks and saved files
stay as they were, and no class of transformers or PEFT is altered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from . import liger, mlp, providers, rms_norm
from .lora_layers import FusedLoraLinear, four_bit_forward, is_four_bit_lora

# Largest difference from the old forward, relative to the largest output: a few roundings, no more.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def use_fused(model: nn.Module) -> list[str]:
    """Swap in the fast modules where they are exact; one line for the log for each kind swapped.

    Call it after the adapters are attached. Harmless when repeated.
    """
    counts = {"LoRA layers": 0, "RMSNorm layers": 0, "feed-forward blocks": 0, "rotary embeddings": 0}
    module: Any  # its attributes are asked for before they are used
    for module in list(model.modules()):
        if type(module) is PeftLinear:
            module.__class__ = FusedLoraLinear
            counts["LoRA layers"] += 1
        elif is_four_bit_lora(module) and not _is_ours(module):
            counts["LoRA layers"] += _swap(module, four_bit_forward, module.in_features)
        elif _is_rms_norm(module):
            counts["RMSNorm layers"] += _swap(module, _norm_forward, module.weight.shape[0])
        elif _is_gated_mlp(module):
            counts["feed-forward blocks"] += _swap(module, mlp.forward, module.gate_proj.in_features)
        elif type(module).__name__.endswith("Attention") and not _is_ours(module):
            counts["rotary embeddings"] += _swap_rotary(module)
    return [f"fused: {count} {kind}" for kind, count in counts.items() if count]


def _is_rms_norm(module: Any) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and module.weight.ndim == 1
        and _eps(module) is not None
        and not _is_ours(module)
    )


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    eps = _eps(module)
    assert eps is not None
    return rms_norm.rms_norm(hidden_states, module.weight, eps)


def _is_gated_mlp(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    projections = {"gate_proj", "up_proj", "down_proj"}
    return (
        names == {*projections, "act_fn"}
        and all(hasattr(getattr(module, name), "in_features") for name in projections)
        and not _is_ours(module)
    )


def _swap(module: nn.Module, forward: Callable[..., Tensor], width: int) -> bool:
    """Give the instance `forward` if it computes what its own did; say whether it was done."""
    parameter = next(module.parameters())
    floats = [p.dtype for p in module.parameters() if p.dtype in _TOLERANCE]
    # of a 4-bit layer, which has no weight of such a type
    computing = [getattr(part, "compute_dtype", None) for part in module.modules()]
    floats += [dtype for dtype in computing if dtype in _TOLERANCE]
    if parameter.is_meta or not floats:
        return False
    dtype = min(floats, key=lambda kind: torch.finfo(kind).bits)
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        # a fixed input: the random generators stay where they are
        x = torch.arange(4 * width, device=parameter.device, dtype=torch.float32).sin().to(dtype)
        x = x.view(1, 4, width).requires_grad_()
        # with gradients, as in training: without them 4-bit layers take other kernels, or another layout
        with torch.enable_grad():
            expected, output = module(x).detach(), forward(module, x).detach()
    finally:
        for part, flag in flags:
            part.training = flag
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return False
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    if not bool((output - expected).abs().max() <= _TOLERANCE[dtype] * largest):
        return False
    original: Any = type(module)  # mypy takes a class of modules for unhashable
    module.__class__ = _subclass(original, forward)
    return True


def _swap_rotary(attention: nn.Module) -> bool:
    """Give the instance its own forward with Liger's rotary embedding, where Liger runs; say whether so."""
    parameter = next(attention.parameters(), None)
    if parameter is None or not providers.runs("liger", parameter.device):
        return False
    forward = liger.rotary_forward(attention)
    if forward is None:
        return False
    original: Any = type(attention)
    attention.__class__ = _subclass(original, forward)
    return True


@cache
def _subclass(original: Any, forward: Callable[..., Tensor]) -> Any:
    namespace = {"forward": forward, "_shoestring_fused": True, "__module__": __name__}
    return type(f"Fused{original.__name__}", (original,), namespace)


def _is_ours(module: nn.Module) -> bool:
    return hasattr(type(module), "_shoestring_fused")
