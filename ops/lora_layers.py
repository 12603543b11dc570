"""PEFT's LoRA layers with `lora_linear` for a forward: which of them are plain LoRA, and of what tensors.

The base is a frozen nn.Linear, or a bitsandbytes Linear4bit (QLoRA, arXiv 2305.14314), which is dequantised
once in each pass and never kept so.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .lora import Projection, lora_linear


def projection_of(module: nn.Module, x: Tensor | None = None) -> Projection | None:
    """What a frozen linear layer or a PEFT layer that is plain LoRA at this moment computes of x, else None.

    Plain: one active adapter, on, not merged, no variant (DoRA and its like), no bias of its own, dropout of
    PyTorch's kind or none, and a frozen base that is an ordinary nn.Linear or holds 4 bits and computes in
    x's type. A 4-bit base is plain only where gradients are recorded: without them bitsandbytes' own kernels
    for a few rows are better.
    """
    if not isinstance(module, LoraLayer):
        return _base(module, x)
    if not (isinstance(module, PeftLinear) or is_four_bit_lora(module)) or module.fan_in_fan_out:
        return None
    projection = _base(module.get_base_layer(), x)
    if projection is None or module.disable_adapters:
        return None if module.merged else projection
    if module.merged:
        return projection
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.lora_variant or module.lora_bias[names[0]]:
        return None
    name = names[0]
    dropout = _dropout(module, name)
    a, b = module.lora_A[name], module.lora_B[name]
    if dropout is None or type(a) is not nn.Linear or type(b) is not nn.Linear:
        return None
    scaling = float(module.scaling[name])
    return Projection(
        projection.weight, projection.bias, a.weight, b.weight, scaling, dropout, projection.state
    )


def is_four_bit_lora(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA layer on a bitsandbytes Linear4bit; asks for neither package."""
    return any(
        kind.__name__ == "Linear4bit" and kind.__module__ == "peft.tuners.lora.bnb"
        for kind in type(module).__mro__
    )


def _dropout(module: Any, name: str) -> float | None:
    """The share that is dropped at this moment; None for dropout of another kind."""
    part = module.lora_dropout[name]
    if not module.training or isinstance(part, nn.Identity):
        return 0.0
    if type(part) is not nn.Dropout or part.p >= 1:
        return None
    return float(part.p) if part.training else 0.0


def _base(base: Any, x: Tensor | None) -> Projection | None:
    """Of a frozen layer without an adapter."""
    state = None
    if type(base) is not nn.Linear:
        if not isinstance(base, nn.Linear):
            return None
        state = getattr(base.weight, "quant_state", None)
        if state is None or not _is_plain_four_bit(base, state, x):
            return None
    trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return None if trained else Projection(base.weight, base.bias, None, None, state=state)


def _is_plain_four_bit(base: Any, state: Any, x: Tensor | None) -> bool:
    """Whether dequantised weights give what bitsandbytes' layer does, in x's type."""
    return (
        type(base).__module__.startswith("bitsandbytes.")
        and torch.is_grad_enabled()
        and tuple(state.shape) == (base.out_features, base.in_features)
        and not getattr(state, "packing_format_for_cpu", False)
        and (x is None or base.compute_dtype in (None, x.dtype))
        and (x is None or not torch.is_autocast_enabled(x.device.type))
    )


def four_bit_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of PEFT's Linear4bit, [..., in] -> [..., out]; its own wherever ours would not be exact."""
    projection = None if args or kwargs else projection_of(module, x)
    if projection is None or projection.a is None:
        from peft.tuners.lora.bnb import Linear4bit

        output: Tensor = Linear4bit.forward(module, x, *args, **kwargs)
        return output
    return lora_linear(x, projection)


class FusedLoraLinear(PeftLinear):
    """PEFT's LoRA layer with `lora_linear` for a forward, and PEFT's own wherever that would not be exact."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        projection = None if args or kwargs else projection_of(self, x)
        if projection is None or projection.a is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return lora_linear(x, projection)
