"""The axis that budgets are measured on."""

import time
from typing import Final

_BOOTTIME: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)  # runs on in suspend; Linux has it
_SLEPT_BEFORE: Final = 0.0 if _BOOTTIME is None else time.clock_gettime(_BOOTTIME) - time.monotonic()


def deadline_now() -> float:
    """Seconds on the axis of `time.monotonic()`, but running on while the machine is suspended.

    Why: a time budget is a promise about when the result is there, and a rented machine is billed asleep or
    not. A stopped process (SIGSTOP, a debugger) counts for the same reason. Times taken with
    `time.monotonic()` before this module was imported can be compared with it. On systems without
    CLOCK_BOOTTIME it is `time.monotonic()`.
    """
    if _BOOTTIME is None:
        return time.monotonic()
    # The offset was taken from two clocks, one after the other; the microseconds between change nothing.
    return time.clock_gettime(_BOOTTIME) - _SLEPT_BEFORE
