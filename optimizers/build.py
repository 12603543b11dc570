"""The optimizer that the recipe names."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError
from ..recipes.optimizers import (
    Adafactor,
    AdaLomo,
    AdamMini,
    AdamW,
    AdamW8bit,
    Apollo,
    ApolloMini,
    BAdam,
    Came,
    Cosmos,
    Frugal,
    GaLore,
    Lion,
    Lion8bit,
    Lomo,
    Muon,
    NaturalGaLore,
    OptimizerConfig,
    PagedAdamW8bit,
    QApollo,
    ScheduleFreeAdamW,
    Soap,
)
from . import adalomo, apollo, badam, cosmos, frugal, galore, lomo, muon, natural_galore, q_apollo, soap
from .elementwise import AdamW as OwnAdamW
from .elementwise import Lion as OwnLion
from .from_libraries import build_from_library
from .groups import parameter_groups

_log = logging.getLogger(__name__)
_FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
_MATRICES = (Apollo, ApolloMini, QApollo, GaLore, NaturalGaLore, Frugal, Cosmos, Muon, Soap)
_NOT_ARGUMENTS = {"name", "learning_rate", "max_grad_norm", "step_in_backward", "clipping", "group_size"}


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, loraplus_lr_ratio: float | None = None, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer of all parameters of `model` that require a gradient, in the groups of
    `parameter_groups`.

    Its rate is zero until `set_rate` gives one: the schedule sets it at every step. seed: of random
    projections and rounding. Raises UserError when a package that the optimizer needs is missing.
    """
    decay = config.weight_decay or 0.0  # auto, where no plan decided
    config = config.model_copy(update={"weight_decay": decay})
    groups = parameter_groups(
        model,
        weight_decay=decay,
        loraplus_lr_ratio=loraplus_lr_ratio,
        matrices=isinstance(config, _MATRICES),
        rank=getattr(config, "rank", None) if isinstance(config, _MATRICES) else None,
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    options = {key: getattr(config, key) for key in type(config).model_fields if key not in _NOT_ARGUMENTS}
    match config:
        case AdamW():
            if any(asks_for_own_adamw(config, p.dtype) for p in parameters):
                return OwnAdamW(groups, lr=0.0, seed=seed, **options)
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
        case Apollo():
            return apollo.APOLLO(groups, lr=0.0, seed=seed, **options)
        case ApolloMini():
            return apollo.APOLLOMini(groups, lr=0.0, seed=seed, **options)
        case QApollo():
            return q_apollo.QAPOLLO(groups, lr=0.0, seed=seed, **options)
        case NaturalGaLore():
            return natural_galore.NaturalGaLore(groups, lr=0.0, seed=seed, **options)
        case GaLore():
            return galore.GaLore(groups, lr=0.0, seed=seed, **options)
        case Frugal():
            return frugal.FRUGAL(groups, lr=0.0, seed=seed, **options)
        case Cosmos():
            return cosmos.COSMOS(groups, lr=0.0, seed=seed, **options)
        case Muon():
            return muon.Muon(groups, lr=0.0, seed=seed, **options)
        case Soap():
            return soap.SOAP(groups, lr=0.0, seed=seed, **options)
        case BAdam():
            return badam.build(model, config, seed=seed, loraplus_lr_ratio=loraplus_lr_ratio)
        case Lomo():
            return lomo.LOMO(groups, lr=0.0, seed=seed, **options)
        case AdaLomo():
            return adalomo.AdaLOMO(groups, lr=0.0, seed=seed, **options)
        case Lion():
            return OwnLion(groups, lr=0.0, seed=seed, **options)
        case Adafactor() | AdamMini() | Came() | ScheduleFreeAdamW():
            return build_from_library(model, config, groups)
        case _:
            assert_never(config)


def takes_matrices(config: OptimizerConfig) -> bool:
    """Whether the rule is for matrices and AdamW takes all other tensors."""
    return isinstance(config, _MATRICES)


def asks_for_own_adamw(config: AdamW, dtype: torch.dtype) -> bool:
    """Whether an option asks for more than torch's AdamW does with weights of `dtype`."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return config.state_bits != 32 or config.step_in_backward or (narrow and config.weights != "plain")


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
