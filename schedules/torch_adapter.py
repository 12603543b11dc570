"""Our schedules in other people's loops: a torch LRScheduler that follows a budget."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ..recipes.errors import UserError
from .build import Schedule
from .clock import Clock
from .limits import Limits
from .permit import StepPermit

_log = logging.getLogger(__name__)


class BudgetLR(LRScheduler):
    """A schedule for plain torch, Accelerate, transformers' Trainer, and what is built on them.

    schedule: from `build_schedule`. Exactly one of these drives it:
    total_steps: optimizer steps. clock: a Clock with limits (time, money, energy, steps, tokens), made with
    `warmup=schedule.warmup`; each optimizer step counts `tokens_per_step` tokens. progress: called once for
    each step, for the share of the budget that is used at the end of the step about to run.

    rate: the peak; None takes each group's `initial_lr`, or its `lr`, as torch's schedulers do. With a rate,
    a group gets it times its `rate_scale` (LoRA+), where it has one.

    What counts are the optimizer's own steps. So `step()` may be called twice, once for each process by
    Accelerate, or after a step that a gradient scaler skipped, and sets the same rate; a load in either order
    with the optimizer's is right; and past the end the rate stays at the floor. As everywhere in this package
    the factor is that of the end of the step about to run: the first step has a rate above 0, the last one
    lands. `done` says that the budget is used up.

    Raises UserError for arguments that contradict each other, and BudgetError when the clock has no room for
    a first step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        total_steps: int | None = None,
        clock: Clock | None = None,
        progress: Callable[[], float] | None = None,
        tokens_per_step: int = 1,
        rate: float | None = None,
    ) -> None:
        drivers = {"total_steps": total_steps, "clock": clock, "progress": progress}
        given = [name for name, value in drivers.items() if value is not None]
        if len(given) != 1:
            raise UserError(
                f"BudgetLR: {' and '.join(given) or 'nothing'} given; exactly one of {', '.join(drivers)} "
                "says how far the run is.\n  For example BudgetLR(optimizer, schedule, total_steps=1000)"
            )
        if total_steps is not None and total_steps < 1:
            raise UserError(f"BudgetLR: total_steps is {total_steps}; allowed: a whole number of at least 1")
        if clock is None:
            limits = Limits(epochs=1.0) if total_steps is None else Limits(steps=total_steps)
            clock = Clock(limits, started=0.0, now=lambda: 0.0, warmup=schedule.warmup)
        else:
            _check_clock(clock, schedule)
        self._schedule, self._clock, self._tokens = schedule, clock, tokens_per_step
        self._driver, self._progress = given[0], progress
        self._made = 0  # optimizer steps
        self._planned = -1  # the step that `_permit` is for
        self._permit: StepPermit
        # Accelerate's wrapper is an Optimizer without hooks of its own.
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        for group in inner.param_groups:
            if rate is not None:
                group["initial_lr"] = rate * group.get("rate_scale", 1.0)
        if not any(float(group.get("initial_lr", group["lr"])) for group in inner.param_groups):
            raise UserError(
                "BudgetLR: the optimizer's rate is 0 in every group, and a schedule only multiplies it.\n"
                "  Give the peak, such as BudgetLR(..., rate=1e-3)"
            )
        super().__init__(inner)
        me = weakref.ref(self)

        def count(*_: object) -> None:
            scheduler = me()
            if scheduler is not None:
                scheduler._count()

        inner.register_step_post_hook(count)

    @property
    def done(self) -> bool:
        """Whether the budget allows no further step; a loop that goes on trains at the floor."""
        return not self._permit.go

    @property
    def factor(self) -> float:
        """What the rates of the step about to run are multiplied by."""
        return self._schedule.factor(self._permit) if self._permit.go else self._schedule(1.0)

    def step(self, epoch: int | None = None) -> None:
        """Set the rates of the step about to run; calling it again before that step changes nothing.

        epoch: refused unless None, since the optimizer's steps are counted.
        """
        if epoch is not None:
            raise UserError(
                f"BudgetLR.step: epoch is {epoch}; the optimizer's own steps are counted.   Call step()"
            )
        self._plan()
        self.last_epoch = self._made
        self._step_count = self._made + 1  # where Accelerate looks for it
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = float(rate)
        self._last_lr = [_copy(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """Rates of the step about to run, a group each."""
        return [base * self.factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Plain values, which torch.load reads with weights_only=True."""
        return {
            "driver": self._driver,
            "steps": self._made,
            "base_lrs": [float(rate) for rate in self.base_lrs],
            "clock": self._clock.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, and set the rates of the next step.

        The budget given to this one counts, not the saved one; a difference is logged, and progress goes on
        from where it stands to the new end, so that the rate does not jump. Raises UserError for the state of
        another optimizer or another kind of driver, BudgetError when more than this budget is used already.
        """
        driver, groups = state_dict["driver"], len(state_dict["base_lrs"])
        if driver != self._driver or groups != len(self.base_lrs):
            raise UserError(
                f"BudgetLR: the state was saved with {driver} and {groups} parameter groups; this one has "
                f"{self._driver} and {len(self.base_lrs)}.\n  Make the optimizer and BudgetLR as they were"
            )
        self.base_lrs = list(state_dict["base_lrs"])
        change = self._clock.load_state_dict(state_dict["clock"])
        if change is not None:
            _log.warning("BudgetLR: saved with another %s", change)
        self._made, self._planned = int(state_dict["steps"]), -1
        self.step()

    def _plan(self) -> None:
        if self._planned != self._made:
            used = 0.0 if self._progress is None else min(max(self._progress(), 0.0), 1.0)
            self._permit = self._clock.plan_step(self._tokens, used)
            self._planned = self._made

    def _count(self) -> None:
        """The optimizer has made a step."""
        self._plan()  # where two steps came without a call of `step` between them
        if self._permit.go:
            self._clock.finish_step(0.0, self._tokens)
        self._made += 1


def _check_clock(clock: Clock, schedule: Schedule) -> None:
    if clock.limits.epochs is not None:
        raise UserError(
            f"BudgetLR: the clock's limit epochs={clock.limits.epochs:g} cannot be counted from optimizer "
            "steps.\n  Give steps, as total_steps=..., or progress=lambda: epochs_at_the_end_of_the_step / "
            f"{clock.limits.epochs:g}"
        )
    if clock._warmup != schedule.warmup:
        raise UserError(
            f"BudgetLR: the clock was made with {clock._warmup} and the schedule with {schedule.warmup}.\n"
            "  Write Clock(limits, started=..., warmup=schedule.warmup)"
        )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise UserError(
            f"BudgetLR: clock with {distributed.get_world_size()} processes; no two clocks are equal, and "
            "the processes would disagree on rate and end.\n  Give total_steps=..., or progress=... that one "
            "process decides and sends to all"
        )


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate
