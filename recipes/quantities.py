"""Amounts as people write them: `3h`, `20 USD`, `0.5 kWh`, `16 GiB`, `2M`; `10%` or `5min` for "how often".

Each amount is a number (a subclass of float or int, in the unit its class names), so arithmetic needs no
unpacking, and keeps the text it was written as in `.text`, so that `resolved.yaml` and messages repeat the
user's own words.
`parse` raises ValueError with a sentence that says what was given and what is allowed.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Self

_NUMBER = r"(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_SECONDS = {
    "s": 1, "sec": 1, "second": 1, "seconds": 1,
    "m": 60, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hour": 3600, "hours": 3600,
    "d": 86400, "day": 86400, "days": 86400,
}  # fmt: skip
_JOULES = {"j": 1, "kj": 1e3, "mj": 1e6, "wh": 3600, "kwh": 3.6e6, "mwh": 3.6e9}
_BYTES = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_SYMBOLS = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY"}
_PART = re.compile(rf"\s*({_NUMBER})\s*([A-Za-z]+)")
_CLOCK = re.compile(r"([0-9]+):([0-5][0-9]):([0-5][0-9])")


def _show(given: object) -> str:
    text = repr(given) if isinstance(given, str) else str(given)
    return text if len(text) <= 60 else text[:57] + "..."


def _with_unit(given: object, unit: str) -> str:
    """A guess for a plain number, which has no unit."""
    plain = isinstance(given, int | float) and not isinstance(given, bool) and given > 0
    return f".   Did you mean {given}{unit} ?" if plain else ""


def _finite_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


class _Real(float):
    """A positive, finite number that remembers its text; subclasses say the unit and how text is read."""

    allowed = ""
    unit = ""
    text: str

    def __new__(cls, value: float, text: str | None = None) -> Self:
        """Make the amount from its value in the class's unit."""
        if not _finite_positive(value):
            raise ValueError(f"{_show(text or value)} is not above 0 and finite; allowed: {cls.allowed}")
        self = super().__new__(cls, value)
        self.text = text if text is not None else cls.write(float(value))
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[float, str]]:
        """Keep value and text through copy and pickle."""
        return type(self), (float(self), self.text)

    @classmethod
    def write(cls, value: float) -> str:
        """Text for an amount that was computed and not written by a person."""
        raise NotImplementedError(cls.__name__)

    @classmethod
    def read(cls, text: str) -> float | None:
        """Value of the text in the class's unit; None if it is not this kind of amount."""
        raise NotImplementedError(cls.__name__)

    @classmethod
    def parse(cls, given: Any) -> Self:
        """Read what a recipe holds. Raises ValueError saying what is allowed."""
        if isinstance(given, cls):
            return given
        value = cls.read(given.strip()) if isinstance(given, str) else None
        if value is None:
            raise ValueError(f"{_show(given)} is not {cls.allowed}{_with_unit(given, cls.unit)}")
        return cls(value, given.strip())


class Seconds(_Real):
    """A duration, in seconds."""

    allowed = "a duration such as 90s, 5min, 1h30m, 3h or 2d"
    unit = "s"

    @classmethod
    def write(cls, value: float) -> str:
        """`5400.0` -> `5400s`."""
        return f"{value:.15g}s"

    @classmethod
    def read(cls, text: str) -> float | None:
        """Sum of parts like `1h30m`, or hours:minutes:seconds."""
        if clock := _CLOCK.fullmatch(text):
            hours, minutes, seconds = (int(part) for part in clock.groups())
            return hours * 3600.0 + minutes * 60 + seconds
        total, position = 0.0, 0
        while position < len(text):
            part = _PART.match(text, position)
            if part is None or part[2].lower() not in _SECONDS:
                return None
            total += float(part[1]) * _SECONDS[part[2].lower()]
            position = part.end()
        return total if position else None


class Money(_Real):
    """An amount of money, in units of `.currency` (a three-letter code)."""

    allowed = "an amount of money with its currency, such as 20 USD"
    unit = " USD"

    @property
    def currency(self) -> str:
        """Three-letter code, `USD` for `$20`."""
        return _currency(self.text.split("/")[0])[1]

    @classmethod
    def write(cls, value: float) -> str:
        """Money without a currency has no text."""
        raise ValueError(f"{value} has no currency; allowed: {cls.allowed}")

    @classmethod
    def read(cls, text: str) -> float | None:
        """`20 USD`, `USD 20` or `$20`."""
        return _currency(text)[0]


class Price(Money):
    """The price of the machine, in units of `.currency` per hour."""

    allowed = "a price per hour such as 2.49 USD/h"
    unit = " USD/h"

    @classmethod
    def read(cls, text: str) -> float | None:
        """`2.49 USD/h` or `$2.49/hour`."""
        amount, slash, unit = text.partition("/")
        if not slash or unit.strip().lower() not in ("h", "hour", "hr"):
            return None
        return _currency(amount)[0]


def _currency(text: str) -> tuple[float | None, str]:
    """(amount, currency code) of `20 USD`, `USD 20` or `$20`; (None, "") when the text is none of them."""
    unit = r"([A-Z]{3}|[$€£¥])"
    text = text.strip()
    after = re.fullmatch(rf"({_NUMBER})\s*{unit}", text)
    before = re.fullmatch(rf"{unit}\s*({_NUMBER})", text)
    if after:
        number, code = after[1], after[2]
    elif before:
        number, code = before[2], before[1]
    else:
        return None, ""
    return float(number), _SYMBOLS.get(code, code)


class Joules(_Real):
    """An amount of energy, in joules."""

    allowed = "an amount of energy such as 500 Wh, 0.5 kWh or 2 MJ"
    unit = " Wh"

    @classmethod
    def write(cls, value: float) -> str:
        """`7200.0` -> `7200 J`."""
        return f"{value:.15g} J"

    @classmethod
    def read(cls, text: str) -> float | None:
        """A number and a unit of energy; upper and lower case are the same."""
        part = _PART.fullmatch(text)
        if part is None or part[2].lower() not in _JOULES:
            return None
        return float(part[1]) * _JOULES[part[2].lower()]


class _Whole(int):
    """A positive whole number that remembers its text."""

    allowed = ""
    text: str

    def __new__(cls, value: float, text: str | None = None) -> Self:
        """Make the amount from its value in the class's unit."""
        if not _finite_positive(value) or int(value) < 1:
            raise ValueError(f"{_show(text or value)} is not above 0 and finite; allowed: {cls.allowed}")
        self = super().__new__(cls, int(value))
        self.text = text if text is not None else cls.write(int(value))
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[int, str]]:
        """Keep value and text through copy and pickle."""
        return type(self), (int(self), self.text)

    @classmethod
    def write(cls, value: int) -> str:
        """Text for an amount that was computed and not written by a person."""
        raise NotImplementedError(cls.__name__)


class Bytes(_Whole):
    """An amount of memory or disk, in bytes. GB is 10^9, GiB is 2^30."""

    allowed = "an amount of memory such as 16GB (10^9 bytes) or 16 GiB (2^30)"

    @classmethod
    def write(cls, value: int) -> str:
        """`1024` -> `1024 B`."""
        return f"{value} B"

    @classmethod
    def parse(cls, given: Any) -> Self:
        """Read `16GB`, `16 GiB` or `500 MB`. Raises ValueError saying what is allowed."""
        if isinstance(given, cls):
            return given
        part = _PART.fullmatch(given.strip()) if isinstance(given, str) else None
        if part is None or part[2].lower() not in _BYTES:
            raise ValueError(f"{_show(given)} is not {cls.allowed}{_with_unit(given, ' GB')}")
        return cls(float(part[1]) * _BYTES[part[2].lower()], str(given).strip())


class Count(_Whole):
    """A whole number of things: 500, 2M, 1.5e6."""

    allowed = "a whole number above 0, such as 500, 20k, 2M or 1.5e6"

    @classmethod
    def write(cls, value: int) -> str:
        """`1024` -> `1024`."""
        return str(value)

    @classmethod
    def parse(cls, given: Any) -> Self:
        """Read a number or text with k, M, B, T. Raises ValueError saying what is allowed."""
        if isinstance(given, cls):
            return given
        value: float | None = None
        if isinstance(given, int | float) and not isinstance(given, bool):
            value = given
        elif isinstance(given, str) and (part := re.fullmatch(rf"({_NUMBER})\s*([A-Za-z]?)", given.strip())):
            unit = part[2].lower()
            value = float(part[1]) * _COUNTS[unit] if unit in _COUNTS else None
        if value is None or not _finite_positive(value) or abs(value - round(value)) > 1e-9 * value:
            raise ValueError(f"{_show(given)} is not {cls.allowed}")
        return cls(round(value), str(given).strip())


@dataclass(frozen=True)
class Every:
    """How often: exactly one of steps (500), a share of the budget ("10%") or seconds ("5min")."""

    steps: int | None = None
    share: float | None = None
    seconds: float | None = None

    allowed = "a number of steps such as 500, a share of the budget such as 10%, or a duration such as 5min"

    def __post_init__(self) -> None:
        given = [value for value in (self.steps, self.share, self.seconds) if value is not None]
        if len(given) != 1 or not _finite_positive(given[0]) or (self.share is not None and self.share > 1):
            raise ValueError(f"{self} is not {self.allowed}")

    @property
    def text(self) -> str | int:
        """What a recipe would say: 500, `10%` or `5min`."""
        if self.steps is not None:
            return int(self.steps)
        if self.share is not None:
            return f"{self.share * 100:.12g}%"
        assert self.seconds is not None
        return self.seconds.text if isinstance(self.seconds, Seconds) else Seconds.write(self.seconds)

    @classmethod
    def parse(cls, given: Any) -> "Every":
        """Read 500, `10%` or `5min`. Raises ValueError saying what is allowed."""
        if isinstance(given, cls):
            return given
        if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
            return cls(steps=given)
        text = given.strip() if isinstance(given, str) else ""
        if share := re.fullmatch(rf"({_NUMBER})\s*%", text):
            if 0 < float(share[1]) <= 100:
                return cls(share=float(share[1]) / 100)
        elif seconds := Seconds.read(text):
            return cls(seconds=Seconds(seconds, text))
        share_like = isinstance(given, float) and 0 < given < 1
        guess = f".   Did you mean {given * 100:.12g}% ?" if share_like else ""
        raise ValueError(f"{_show(given)} is not {cls.allowed}{guess}")
