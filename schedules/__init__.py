"""Profiles (progress -> factor) and the Clock that knows the budget."""

from .cadence import Cadence
from .clock import Clock
from .energy import Counter, energy_counters
from .limits import Limits
from .now import deadline_now
from .permit import StepPermit
from .profiles import Schedule, build_schedule
from .warmup import Warmup

__all__ = [
    "Cadence",
    "Clock",
    "Counter",
    "Limits",
    "Schedule",
    "StepPermit",
    "Warmup",
    "build_schedule",
    "deadline_now",
    "energy_counters",
]
