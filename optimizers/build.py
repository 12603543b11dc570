"""The optimizer that the recipe names."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from ..recipes.choices import AdamW, AdamW8bit, Lion8bit, OptimizerConfig, PagedAdamW8bit
from ..recipes.errors import UserError
from .groups import parameter_groups

_log = logging.getLogger(__name__)
_FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, loraplus_lr_ratio: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer of all parameters of `model` that require a gradient, in the groups of
    `parameter_groups`.

    Its rate is zero until `set_rate` gives one: the schedule sets it at every step. Raises UserError when the
    package of an 8-bit optimizer is missing.
    """
    groups = parameter_groups(model, weight_decay=config.weight_decay, loraplus_lr_ratio=loraplus_lr_ratio)
    parameters = [parameter for group in groups for parameter in group["params"]]
    match config:
        case AdamW():
            return torch.optim.AdamW(
                groups, lr=0.0, betas=config.betas, eps=config.eps, fused=_can_fuse(parameters)
            )
        case AdamW8bit():
            return _adamw_8bit(groups, config, paged=False)
        case PagedAdamW8bit():
            on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
            if on_cpu:
                _log.warning("optimizer: paged_adamw_8bit has nothing to page on a CPU; adamw_8bit is used")
            return _adamw_8bit(groups, config, paged=not on_cpu)
        case Lion8bit():
            lion = _bitsandbytes(config.name).optim.Lion8bit
            return _built(lion(groups, lr=0.0, betas=config.betas))
        case _:
            assert_never(config)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step; each group gets `rate` times its `rate_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


def _can_fuse(parameters: list[Tensor]) -> bool:
    return all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)


def _adamw_8bit(
    groups: list[dict[str, Any]], config: AdamW8bit | PagedAdamW8bit, *, paged: bool
) -> torch.optim.Optimizer:
    adamw = _bitsandbytes(config.name).optim.AdamW8bit
    return _built(adamw(groups, lr=0.0, betas=config.betas, eps=config.eps, is_paged=paged))


def _built(optimizer: Any) -> torch.optim.Optimizer:
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _bitsandbytes(name: str) -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"optimizer.name  {name} needs the package bitsandbytes: {error}\n"
            '                Install it: pip install "shoestring[quantized]"   or use optimizer.name=adamw'
        ) from None
    return bitsandbytes
