"""How a figure is written for a person: bytes, counts, durations, rates. Screen and report share these."""

from __future__ import annotations

import math
from datetime import datetime, timedelta


def bytes_text(value: float | None) -> str:
    """Decimal units, as memory and disks are sold: 27_100_000_000 -> "27.1 GB"."""
    if value is None:
        return "–"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{_three(value / size)} {unit}"
    return f"{value:.0f} B"


def count_text(value: float | None) -> str:
    """Three significant digits and a unit: 134_515_008 -> "135 M"."""
    if value is None:
        return "–"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{_three(value / size)} {unit}"
    return f"{value:.0f}" if value == int(value) else _three(value)


def duration_text(seconds: float | None) -> str:
    """Two units at most: 8_040 -> "2 h 14 min", 62 -> "1 min 02 s", 4.2 -> "4.2 s"."""
    if seconds is None:
        return "–"
    if seconds < 0:
        return "-" + duration_text(-seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def energy_text(joules: float | None) -> str:
    """Joules, or watt hours where that is what the meter at home says: 36_000 -> "10.0 Wh"."""
    if joules is None:
        return "–"
    if joules >= 3.6e6:
        return f"{_three(joules / 3.6e6)} kWh"
    return f"{_three(joules / 3600)} Wh" if joules >= 360 else f"{_three(joules)} J"


def number_text(value: float | None) -> str:
    """A plain number at four significant digits; very large and very small ones with an exponent."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def share_text(value: float | None) -> str:
    """A share of one in percent: 0.0345 -> "3.5 %"."""
    if value is None:
        return "–"
    percent = 100 * value
    return f"{percent:.0f} %" if percent >= 9.95 or percent == 0 else f"{percent:.2g} %"


def clock_text(seconds_from_now: float, now: datetime | None = None) -> str:
    """Time of day `seconds_from_now` ahead; the weekday too once it is not today."""
    now = now or datetime.now()
    then = now + timedelta(seconds=seconds_from_now)
    if then.date() == now.date():
        return then.strftime("%H:%M:%S" if seconds_from_now < 3600 else "%H:%M")
    return then.strftime("%a %H:%M" if seconds_from_now < 6 * 86400 else "%Y-%m-%d %H:%M")


def _three(value: float) -> str:
    """Three significant digits without an exponent, for magnitudes below 1000."""
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}"
