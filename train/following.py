"""What else moves with the budget: functions that are told each step's permit before it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..recipes import ScheduleConfig
from ..schedules import StepPermit, decay_factor


def weight_decay_follower(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig
) -> Callable[[StepPermit], None] | None:
    """Moves the weight decay of every group by `schedule.weight_decay`; None where it stays constant.

    The groups' decay at this moment, before a checkpoint is loaded, is what the factor multiplies.
    """
    if config.weight_decay == "constant":
        return None
    given = [float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups]

    def follow(permit: StepPermit) -> None:
        factor = decay_factor(config, permit.progress)
        for group, decay in zip(optimizer.param_groups, given, strict=True):
            group["weight_decay"] = decay * factor

    return follow
