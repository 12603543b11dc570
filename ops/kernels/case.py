"""A kernel as its launcher would compile it, for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """What tests compile ahead of time, and the limits that hold for the result.

    signature: type of each argument that is no constexpr ("*fp32", "i64", "fp32"); aligned: arguments that
    are multiples of 16 (pointers are, unless `unaligned` names them). Limits are asserted for each of the
    capabilities; `wide`: whether loads of 128 bits are expected; `dots`: whether tensor cores are.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    max_registers: int = 128
    max_shared: int = 96 * 1024
    wide: bool = True
    dots: bool = False
    capabilities: tuple[int, ...] = field(default=(80, 90))
