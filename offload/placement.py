"""Where each part of the training state lives: the plan's decision, one line for each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..recipes.offload import Tier

Part = Literal["weights", "gradients", "optimizer", "activations", "swapped", "ring"]


@dataclass(frozen=True)
class Placed:
    """A part on a tier, in bytes. why: one line. coded: frozen layers lie there in the lossless code."""

    part: Part
    tier: Tier
    bytes: int
    why: str
    coded: bool = False


@dataclass(frozen=True)
class Placement:
    """All parts that there are; on a machine without an accelerator host memory is called "device"."""

    parts: tuple[Placed, ...] = ()

    def tier(self, part: Part) -> Tier:
        """Where `part` lives; a part that is not listed is on the device."""
        return next((placed.tier for placed in self.parts if placed.part == part), "device")

    @property
    def coded(self) -> bool:
        """Whether frozen layers lie on disk in the lossless code."""
        return any(placed.coded for placed in self.parts)

    @property
    def all_on_device(self) -> bool:
        """Whether nothing is moved."""
        return all(placed.tier == "device" and placed.part != "ring" for placed in self.parts)

    def rows(self) -> list[tuple[str, str, int, str]]:
        """(part, tier, bytes, why) of each part, as the plan prints them."""
        return [(placed.part, placed.tier, placed.bytes, placed.why) for placed in self.parts]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values; `from_json` gives the same placement back."""
        return [asdict(placed) for placed in self.parts]

    @classmethod
    def from_json(cls, value: Sequence[dict[str, Any]]) -> Placement:
        """The placement in `to_json`'s value. ValueError: not one of ours."""
        try:
            parts = tuple(Placed(**placed) for placed in value)
        except TypeError as error:
            raise ValueError(f"not a placement: {error}") from None
        for placed in parts:
            if placed.part not in get_args(Part) or placed.tier not in get_args(Tier):
                raise ValueError(f"not a placement: {placed.part} on {placed.tier}")
        return cls(parts)
