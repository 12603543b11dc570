"""The engine that the recipe names."""

from __future__ import annotations

from typing import assert_never

import torch
from accelerate import Accelerator

from ..recipes import DeepSpeedConfig, Fsdp2Config, NativeEngineConfig, Recipe
from ..recipes.errors import UserError
from .deepspeed_engine import DeepSpeedEngine
from .deepspeed_import import check_deepspeed
from .engine import NativeEngine
from .fsdp_engine import Fsdp2Engine
from .objectives import LossModule


def check_engine(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raise UserError where the machine lacks what the engine needs, before anything is read or loaded."""
    match recipe.engine:
        case NativeEngineConfig():
            pass
        case DeepSpeedConfig() as config:
            check_deepspeed(config, accelerator)
        case Fsdp2Config() as config:
            if config.cpu_offload and accelerator.device.type == "cpu":
                raise UserError(
                    "engine.cpu_offload=true moves shards from the GPU to host memory, and this machine has "
                    "no GPU.   Set engine.cpu_offload=false"
                )
        case _ as other:
            assert_never(other)


def build(
    recipe: Recipe,
    accelerator: Accelerator,
    module: LossModule,
    optimizer: torch.optim.Optimizer,
    *,
    autocast: bool,
) -> NativeEngine:
    """The engine over a model with its loss, and the optimizer of its trained parameters."""
    match recipe.engine:
        case NativeEngineConfig():
            return NativeEngine(accelerator, module, optimizer, autocast)
        case DeepSpeedConfig() as config:
            clip = recipe.optimizer.max_grad_norm
            return DeepSpeedEngine(
                accelerator, module, optimizer, autocast, config=config, max_grad_norm=clip
            )
        case Fsdp2Config() as config:
            return Fsdp2Engine(accelerator, module, optimizer, autocast, config=config)
        case _ as other:
            assert_never(other)
