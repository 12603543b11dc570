"""Legs: more budget for a finished run, and by which rule its rate leaves the floor again.

A finished run has landed: its rate is at the floor, and raising it in silence would undo what annealing won.
So each schedule has a rule, which is printed and kept in legs.json:

- `hold`: the rate never fell; it stays.
- `wsd`: go on from the state before the decay (kept by checkpoint.keep_pre_decay) at the peak, then decay
  again. What the first decay learned is given up; its time stays spent (arXiv:2405.18392, section 4).
- `wsd_s`: go on from the decayed state, straight back to the peak, then decay again (arXiv:2410.05192).
- `rewarm`: any other schedule, or wsd without a kept state: rise from nothing to a share of the old peak over
  a new warm-up, then the same profile over the new budget.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.whole import step_of
from ..recipes import BudgetConfig, ScheduleConfig, WsdSchedule, WsdSSchedule
from ..schedules import Limits, Schedule, Warmup, build_schedule
from .rundir import kept

REWARM_PEAK = 0.5
"""Share of the first peak that a re-warmed leg rises to. Ours: half undoes less than the whole peak would."""
REWARM_SHARE = 0.05
"""Warm-up of a re-warmed leg whose schedule has none."""

Rule = Literal["hold", "wsd", "wsd_s", "rewarm"]


@dataclass(frozen=True)
class Leg:
    """One extension. budget: the recipe's section, for this leg alone. peak: of its rate, as a share of the
    first leg's. source: the checkpoint whose weights it starts from. step, seconds, tokens: where it began.
    """

    budget: dict[str, Any]
    rule: Rule
    why: str
    peak: float
    source: str
    step: int
    seconds: float
    tokens: int

    @property
    def given(self) -> BudgetConfig:
        """The leg's budget as the recipe would hold it."""
        return BudgetConfig.model_validate(self.budget)

    @property
    def limits(self) -> Limits:
        """What the leg may spend, counted from where it began."""
        return Limits.from_recipe(self.given)


def choose_rule(schedule: ScheduleConfig, before_decay: int | None) -> tuple[Rule, str]:
    """The rule for one more leg of a run with this schedule, and one line for the person.

    before_decay: step of the checkpoint kept before the decay, None without one.
    """
    match schedule:
        case WsdSchedule() if before_decay is not None:
            return "wsd", f"wsd goes on from step {before_decay}, before the decay, at its peak rate"
        case WsdSchedule():
            line = "no state before the decay was kept (checkpoint.keep_pre_decay=true keeps it)"
            return "rewarm", f"{line}, so the rate rises again from nothing"
        case WsdSSchedule():
            return "wsd_s", "wsd_s goes on from the decayed state, straight back to the peak rate"
    if schedule.name == "constant":
        return "hold", "a constant rate stays as it is"
    return "rewarm", f"{schedule.name} has landed, so the rate rises again from nothing"


def leg_schedule(config: ScheduleConfig, legs: list[Leg]) -> Schedule:
    """The schedule of the last leg; of the recipe where there is none."""
    if not legs:
        return build_schedule(config)
    rule = legs[-1].rule
    if rule == "wsd_s" and isinstance(config, WsdSSchedule):
        config = config.model_copy(update={"periods": 1})
    schedule = build_schedule(config)
    if rule != "rewarm":
        return replace(schedule, warmup=Warmup())
    if schedule.warmup == Warmup():
        return replace(schedule, warmup=Warmup(share=REWARM_SHARE))
    return schedule


def read_legs(path: Path) -> list[Leg]:
    """The legs in legs.json; none where there is no such file. Raises UserError when it is damaged."""
    if not path.exists():
        return []
    with kept(path) as text:
        legs = [Leg(**leg) for leg in json.loads(text)]
        for leg in legs:
            if step_of(leg.source) is None:
                raise ValueError(f"{leg.source} is no checkpoint of this run")
        return legs


def plain_legs(legs: list[Leg]) -> list[dict[str, Any]]:
    """What legs.json holds."""
    return [asdict(leg) for leg in legs]
