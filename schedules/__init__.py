"""Profiles (progress -> factor) and the Clock that knows the budget."""

from typing import TYPE_CHECKING

from .build import Schedule, build_schedule, decay_factor
from .cadence import Cadence
from .clock import Clock
from .energy import Counter, energy_counters, energy_source
from .limits import Limits
from .now import deadline_now
from .permit import StepPermit
from .profiles import power_hold
from .warmup import Warmup

if TYPE_CHECKING:
    from .torch_adapter import BudgetLR

__all__ = [
    "BudgetLR",
    "Cadence",
    "Clock",
    "Counter",
    "Limits",
    "Schedule",
    "StepPermit",
    "Warmup",
    "build_schedule",
    "deadline_now",
    "decay_factor",
    "energy_counters",
    "energy_source",
    "power_hold",
]


def __getattr__(name: str) -> object:
    """Import what needs torch only when it is asked for: a schedule starts in milliseconds."""
    if name == "BudgetLR":
        from .torch_adapter import BudgetLR

        return BudgetLR
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
