"""Power integrated to energy, for boards that tell their power but count no energy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PERIOD = 0.1
"""Seconds between two readings: about how often the sensors are refreshed."""


class IntegratedPower:
    """Joules since the object was made: the trapezoids under readings of the power, in watts.

    A thread reads every 100 ms, and every call of `joules` does. What a reading raises, the next call of
    `joules` raises again; the first one is made here.
    """

    def __init__(
        self,
        watts: Callable[[], float],
        *,
        now: Callable[[], float] = time.monotonic,
        period: float = PERIOD,
    ) -> None:
        self._watts, self._now, self._period = watts, now, period
        self._total = 0.0
        self._last = (now(), watts())
        self._error: Exception | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._sample, name="integrated power", daemon=True).start()

    def joules(self) -> float:
        """Joules so far, up to this moment."""
        if self._error is not None:
            raise self._error
        return self._add()

    def _add(self) -> float:
        with self._lock:
            now, watts = self._now(), self._watts()
            began, before = self._last
            self._total += 0.5 * (before + watts) * (now - began)
            self._last = (now, watts)
            return self._total

    def _sample(self) -> None:
        while self._error is None:
            time.sleep(self._period)
            try:
                self._add()
            except Exception as error:
                self._error = error
