"""DeepSpeed as a package: whether it is there, and what of it works on this machine."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator

from ..recipes import DeepSpeedConfig
from ..recipes.errors import UserError


def check_deepspeed(config: DeepSpeedConfig, accelerator: Accelerator) -> None:
    """Raise UserError where this machine cannot do what the recipe asks of DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "engine.name  deepspeed needs the package deepspeed, which is not installed.   "
            'Install it: DS_BUILD_OPS=0 pip install "shoestring[deepspeed]"   or use engine=native'
        )
    processes = accelerator.num_processes
    if processes % config.zero_hpz_partition_size:
        raise UserError(
            f"engine.zero_hpz_partition_size={config.zero_hpz_partition_size} must divide the number of "
            f"processes, which is {processes}.   Take a divisor, or 1"
        )
    on_cpu = accelerator.device.type == "cpu"
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if on_cpu and getattr(config, key):
            raise UserError(
                f"engine.{key}=true needs an NVIDIA GPU: DeepSpeed has no such kernel for a CPU.   "
                f"Set engine.{key}=false"
            )
    if config.offload_optimizer == "nvme":
        _check_async_io(accelerator.device)


def _check_async_io(device: torch.device) -> None:
    import_deepspeed(device)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "engine.offload_optimizer=nvme needs DeepSpeed's async_io, which cannot be built here.   Install "
            "libaio's headers (apt install libaio-dev), gcc and ninja; or use engine.offload_optimizer=cpu; "
            "or engine=native with offload.optimizer=disk, which needs none of them"
        )


def import_deepspeed(device: torch.device) -> Any:
    """The module, set to `device`, without what it would compile by itself at the start.

    On a CPU it would build a kernel for sums over shared memory, for minutes; gloo's are used instead.
    """
    on_cpu = device.type == "cpu"
    before = os.environ.get("DS_ACCELERATOR")
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__ as compatible
    finally:
        if on_cpu and before is None:
            del os.environ["DS_ACCELERATOR"]
        elif before is not None:
            os.environ["DS_ACCELERATOR"] = before
    compatible["deepspeed_shm_comm"] = False
    # Said by PyTorch of the names that DeepSpeed uses.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated")
    return deepspeed
