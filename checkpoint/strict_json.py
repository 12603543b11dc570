"""JSON that comes back as it was given, or not at all.

Floats round-trip exactly (shortest repr); not-a-number and the infinities, which JSON has no word for, are
written as `{"$float": "nan"}`. Tuples come back as lists. Anything else that JSON would bend in silence (keys
that are no strings, unknown objects) is refused by name when written; duplicate keys and bare NaN are refused
when read.
"""

from __future__ import annotations

import json
import math
from typing import Any

from .errors import BrokenCheckpoint

_FLOAT = "$float"
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def dumps(value: Any, *, name: str) -> bytes:
    """`value` as UTF-8 JSON. TypeError or ValueError names the place, e.g. `trainer.clock.started`."""
    return json.dumps(_encode(value, name), allow_nan=False, ensure_ascii=True, indent=1).encode()


def loads(data: bytes, *, name: str) -> Any:
    """The value. BrokenCheckpoint when `data` is not what `dumps` writes."""
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_decode, parse_constant=_refuse, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{name} is not valid JSON: {error}") from None


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_FLOAT: str(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: keys must be strings")
        if _FLOAT in value:
            raise ValueError(f"{where} has the reserved key {_FLOAT!r}")
        return {key: _encode(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}: it cannot be written as JSON")


def _decode(pairs: list[tuple[str, Any]]) -> Any:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    if _FLOAT not in result:
        return result
    word = result[_FLOAT]
    if len(result) != 1 or not isinstance(word, str) or word not in _NON_FINITE:
        raise ValueError(f"{_FLOAT} with {str(word)[:20]!r} is not a float")
    return _NON_FINITE[word]


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999
        raise ValueError(f"{text[:20]} is no number that can be held")
    return value
