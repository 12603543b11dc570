"""What ZenFlow needs, and what of it is refused since a run could not keep what it promises."""

from typing import TYPE_CHECKING

from .engine import DeepSpeedConfig, ZenFlowConfig
from .problem import Problem

if TYPE_CHECKING:
    from .schema import Recipe


def zenflow_problems(recipe: "Recipe") -> list[Problem]:
    """Disagreements of `engine.zenflow` with itself and with the rest of the recipe."""
    engine = recipe.engine
    if not isinstance(engine, DeepSpeedConfig) or engine.zenflow is None:
        return []
    return [*_own(engine.zenflow), *_place(engine), *_rest(recipe)]


def _own(zenflow: ZenFlowConfig) -> list[Problem]:
    found = []
    if zenflow.select_strategy != "step" or zenflow.select_interval is None:
        key = "select_strategy" if zenflow.select_strategy != "step" else "select_interval"
        given = zenflow.select_strategy if key == "select_strategy" else "auto"
        found.append(
            Problem(
                f"engine.zenflow.{key}",
                f"engine.zenflow.{key}={given} counts epochs by a loader that DeepSpeed does not have here, "
                "and would choose columns once and never again.   Set engine.zenflow.select_strategy=step "
                "and engine.zenflow.select_interval=32",
            )
        )
    elif zenflow.update_interval is not None and zenflow.select_interval < zenflow.update_interval:
        found.append(
            Problem(
                "engine.zenflow.select_interval",
                f"engine.zenflow.select_interval={zenflow.select_interval} is below "
                f"engine.zenflow.update_interval={zenflow.update_interval}: columns would be chosen anew "
                "before the others are stepped.   Set engine.zenflow.select_interval="
                f"{8 * zenflow.update_interval}",
                ("engine.zenflow.update_interval",),
            )
        )
    if zenflow.update_interval is None:
        found.append(
            Problem(
                "engine.zenflow.update_interval",
                "engine.zenflow.update_interval=auto leaves it to DeepSpeed when the other columns are "
                "stepped, and 0.19 may never do it.   Set engine.zenflow.update_interval=4",
            )
        )
    if zenflow.overlap_step:
        found.append(
            Problem(
                "engine.zenflow.overlap_step",
                "engine.zenflow.overlap_step=true keeps the moments in a process of their own, which no "
                "checkpoint reaches, and the last update is lost.   Set engine.zenflow.overlap_step=false",
            )
        )
    return found


def _place(engine: DeepSpeedConfig) -> list[Problem]:
    found = []
    if engine.zero_stage not in (1, 2):
        why = (
            "all weights lie column by column there, which no file has, and its buffers are for CUDA alone"
            if engine.zero_stage == 3
            else "nothing is in host memory there"
        )
        found.append(
            Problem(
                "engine.zenflow",
                f"engine.zenflow is not for engine.zero_stage={engine.zero_stage}: {why}.   Set "
                "engine.zero_stage=2 (or 1), or engine.zenflow=null",
                ("engine.zero_stage",),
            )
        )
        return found
    if engine.offload_optimizer != "cpu":
        found.append(
            Problem(
                "engine.zenflow",
                "engine.zenflow needs engine.offload_optimizer=cpu, which is "
                f"{engine.offload_optimizer}: the columns that wait do so in host memory.   Set "
                "engine.offload_optimizer=cpu, or engine.zenflow=null",
                ("engine.offload_optimizer",),
            )
        )
    return found


def _rest(recipe: "Recipe") -> list[Problem]:
    found = []
    clip, train = recipe.optimizer.max_grad_norm, recipe.train
    if clip is not None:
        found.append(
            Problem(
                "optimizer.max_grad_norm",
                f"optimizer.max_grad_norm={clip:g} cannot be kept with engine.zenflow: between two updates "
                "of all columns there is no norm of the whole gradient to clip by.   Set "
                "optimizer.max_grad_norm=null, or engine.zenflow=null",
                ("engine.zenflow",),
            )
        )
    if train.per_device_train_batch_size is None or train.gradient_accumulation_steps not in (None, 1):
        key = (
            "per_device_train_batch_size"
            if train.per_device_train_batch_size is None
            else ("gradient_accumulation_steps")
        )
        found.append(
            Problem(
                f"train.{key}",
                "engine.zenflow takes each micro-batch for a step and adds gradients up itself, so that a "
                "step must be one micro-batch.   Set train.per_device_train_batch_size=8 (or what fits) and "
                "train.gradient_accumulation_steps=1",
                ("engine.zenflow",),
            )
        )
    if recipe.adapter is None and recipe.model.dtype == "bfloat16":
        found.append(
            Problem(
                "model.dtype",
                "model.dtype=bfloat16 with engine.zenflow would step the chosen columns in bfloat16, which "
                "rounds small updates away.   Set model.dtype=auto, or engine.zenflow=null",
                ("engine.zenflow",),
            )
        )
    return found
