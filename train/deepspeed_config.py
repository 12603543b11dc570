"""The configuration that DeepSpeed gets from a recipe: what it shards and where that lives, nothing more.

No batch size, no schedule, no clock: the loop has them. The bucket of gradients that are reduced together,
5e8 elements with DeepSpeed, is no larger than what is trained: it is allocated whole.
"""

from __future__ import annotations

from typing import Any

from ..plan.engines import BUCKET
from ..recipes import DeepSpeedConfig
from ..recipes.engine import ZenFlowConfig

PERSISTENT = 100_000
"""Weights of at most so many elements stay whole in stage 3: gathering them costs more than it saves.
DeepSpeed's own default.
"""


def deepspeed_config(
    engine: DeepSpeedConfig,
    *,
    trained: int,
    max_grad_norm: float | None,
    bfloat16: bool,
    on_cpu: bool,
    scratch: str | None,
) -> dict[str, Any]:
    """The dict that `deepspeed.initialize` takes.

    trained: elements that are trained. bfloat16: whether their weights are of that type, so that DeepSpeed
    keeps float32 ones to step. on_cpu: nothing is pinned, since there is no device to copy to. scratch:
    folder of this process alone on the NVMe disk, since DeepSpeed gives files of two runs the same names.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": _zero(engine, trained, scratch, pin=not on_cpu),
    }
    if engine.zenflow is not None:
        # Its optimizer of the chosen columns is made with these; rate and all else are set before each step.
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.0}}
        config["zero_optimization"] |= {
            "reduce_bucket_size": trained,  # one bucket: nothing is stepped before all gradients are known
            "zenflow": _zenflow(engine.zenflow),
        }
    if engine.offload_optimizer == "nvme":
        aio = engine.aio
        config["aio"] = {
            "block_size": aio.block_size,
            "queue_depth": aio.queue_depth,
            "intra_op_parallelism": aio.intra_op_parallelism,
            "single_submit": aio.single_submit,
            "overlap_events": aio.overlap_events,
        }
    return config


def _zero(engine: DeepSpeedConfig, trained: int, scratch: str | None, *, pin: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": min(BUCKET, trained),
        "overlap_comm": pin and engine.zero_stage > 1,  # without an accelerator nothing runs beside
    }
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": engine.offload_optimizer, "pin_memory": pin}
        if engine.offload_optimizer == "nvme":
            zero["offload_optimizer"] |= {
                "nvme_path": scratch,
                "buffer_count": engine.buffer_count,
                "pipeline_read": engine.pipeline_read,
                "pipeline_write": engine.pipeline_write,
            }
    if engine.zero_stage == 3:
        zero |= {
            "sub_group_size": engine.sub_group_size,
            "stage3_param_persistence_threshold": PERSISTENT,
            "zero_hpz_partition_size": engine.zero_hpz_partition_size,
            "zero_quantized_weights": engine.zero_quantized_weights,
            "zero_quantized_gradients": engine.zero_quantized_gradients,
        }
        if engine.offload_param != "none":
            zero["offload_param"] = {"device": engine.offload_param, "pin_memory": pin}
    return zero


def _zenflow(zenflow: ZenFlowConfig) -> dict[str, Any]:
    return {
        "topk_ratio": zenflow.topk_ratio,
        "select_strategy": zenflow.select_strategy,
        "select_interval": zenflow.select_interval,
        "update_interval": zenflow.update_interval,
        "full_warm_up_rounds": zenflow.full_warm_up_rounds,
        "overlap_step": zenflow.overlap_step,
    }
