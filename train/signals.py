"""Ctrl-C and SIGTERM: finish cleanly, then exit 130 or 143; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Set by the handler, read by the loop; the handler itself does nothing else."""

    signal_number: int | None = None

    def __call__(self) -> bool:
        """True once a signal came."""
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells count: 130 for Ctrl-C, 143 for SIGTERM; 0 when none came."""
        return 0 if self.signal_number is None else 128 + self.signal_number

    @property
    def name(self) -> str:
        """The signal's name, for the log."""
        return "" if self.signal_number is None else signal.Signals(self.signal_number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within this block SIGINT and SIGTERM only set the request; afterwards the old handlers are back."""
    request = StopRequest()

    def handle(number: int, _frame: FrameType | None) -> None:
        if request.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = number

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
