"""The schedules that a recipe may name, and what each lets one set.

Every class is one profile; `shoestring.schedules.build_schedule` turns it into the function. Options have the
names of the library that the profile is known from.
"""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from .section import Section

_Share = Annotated[float, Field(gt=0, le=1)]
_WARMUP = "Rise from 0 to the peak: below 1 a share of the budget, from 1 a number of steps."
_LEG = "Length of the last leg, as a share of what follows the warm-up (with wsd_s, of each period)."


def _refusal(sentence: str) -> PydanticCustomError:
    """An error about one key that is shown as `KEY: SENTENCE`."""
    return PydanticCustomError("amount", "{sentence}", {"sentence": sentence})


class _Schedule(Section):
    """What all schedules share."""

    warmup_steps: float = Field(default=0.03, ge=0, description=_WARMUP)
    weight_decay: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="How optimizer.weight_decay moves through the budget: not at all, or down to 0. It is "
        "multiplied by the rate besides.",
    )


class _Decay(_Schedule):
    """What all schedules that come down share."""

    min_factor: float = Field(default=0.0, ge=0, lt=1, description="Where it lands, as a share of the peak.")


class _Leg(_Decay):
    """What schedules with a last leg share."""

    decay_fraction: float = Field(default=0.2, gt=0, le=1, description=_LEG)
    decay_type: Literal["linear", "cosine", "1-sqrt", "inverse", "exponential"] = Field(
        default="1-sqrt",
        description="Shape of the last leg: `1-sqrt` is that of arXiv:2405.18392, `inverse` a straight line "
        "in 1 / rate (arXiv:2410.05192).",
    )
    decay_to: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="End of an `inverse` or `exponential` leg over its beginning; null is 0.1 (others: 0).",
    )

    @field_validator("decay_to")
    @classmethod
    def _only_where_it_ends_above_zero(cls, given: float | None, info: ValidationInfo) -> float | None:
        kind = info.data.get("decay_type")
        if given is not None and kind in ("linear", "cosine", "1-sqrt"):
            raise _refusal(
                f"{given} is where a leg that never reaches 0 ends, and schedule.decay_type={kind} ends at 0."
                f"   Leave it out for schedule.min_factor={given}, or set schedule.decay_type=exponential"
            )
        return given


class ConstantSchedule(_Schedule):
    """The peak rate after warm-up."""

    name: Literal["constant"] = Field(default="constant", description="The peak rate after warm-up.")


class LinearSchedule(_Decay):
    """A straight line down."""

    name: Literal["linear"] = Field(default="linear", description="A straight line down.")


class CosineSchedule(_Decay):
    """Half a cosine wave down."""

    name: Literal["cosine"] = Field(default="cosine", description="Half a cosine wave (arXiv:1608.03983).")


class PolynomialSchedule(_Decay):
    """(1 - x) to a power."""

    name: Literal["polynomial"] = Field(default="polynomial", description="(1 - x) ** power.")
    power: float = Field(default=1.0, gt=0, description="The power; 1 is linear.")


class RexSchedule(_Decay):
    """Reflected exponential (arXiv:2107.04197): stays high for long, then comes down quickly."""

    name: Literal["rex"] = Field(
        default="rex", description="Reflected exponential (arXiv:2107.04197): high for long."
    )
    d: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Bend of (1 - x) / (1 - d + d * (1 - x)): 0 is linear, nearer to 1 stays high for "
        "longer; other tools named rex use 0.9.",
    )


class UbaSchedule(_Decay):
    """UBA, steps from a min-max problem (arXiv:2505.24452); the formula is second-hand."""

    name: Literal["uba"] = Field(
        default="uba",
        description="Experimental: UBA (arXiv:2505.24452), by a formula from third-party code.",
    )
    phi: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="Bend of 1 / (1 + phi / 2 * tan(pi x / 2) ** 2): 2 is cosine, less holds longer, more "
        "comes down earlier. The default is ours.",
    )


class MirrorCosineSchedule(_Decay):
    """The cosine mirrored at the straight line: quick, level in the middle, quick."""

    name: Literal["mirror_cosine"] = Field(
        default="mirror_cosine", description="The cosine mirrored at the straight line (arXiv:2405.18392)."
    )


class SquareSchedule(_Decay):
    """1 - x squared: high for long, at full slope in the end."""

    name: Literal["square"] = Field(default="square", description="1 - x ** 2 (arXiv:2405.18392).")


class WsdSchedule(_Leg):
    """Warm-up, stable, decay (arXiv:2404.06395)."""

    name: Literal["wsd"] = Field(
        default="wsd", description="Hold the peak, then come down in a last leg (arXiv:2404.06395)."
    )


class WsdSSchedule(_Leg):
    """WSD, several times over, each time from the annealed state (WSD-S, arXiv:2410.05192)."""

    name: Literal["wsd_s"] = Field(
        default="wsd_s",
        description="wsd several times over (WSD-S, arXiv:2410.05192): annealed at several budgets in a run.",
    )
    periods: Annotated[int, Field(ge=1)] | Annotated[list[_Share], Field(min_length=1)] = Field(
        default=4,
        json_schema_extra={"x-allowed": "a whole number of at least 1, or rising shares that end at 1"},
        description="A number of equal periods, or their ends as shares of the budget; the warm-up is part "
        "of the first.",
    )

    @field_validator("periods")
    @classmethod
    def _rising_to_one(cls, given: int | list[float]) -> int | list[float]:
        if isinstance(given, list) and (given[-1] != 1 or any(a >= b for a, b in pairwise(given))):
            raise _refusal(
                f"{given} must rise and end at 1: where each period ends, as a share of the budget.   For "
                f"example {_repaired(given)}"
            )
        return given


class OneCycleSchedule(_Schedule):
    """Up and down once (arXiv:1708.07120)."""

    name: Literal["onecycle"] = Field(
        default="onecycle", description="Up and down once (arXiv:1708.07120), as torch's OneCycleLR."
    )
    warmup_steps: float = Field(default=0.0, ge=0, description=_WARMUP)
    pct_start: float = Field(default=0.3, gt=0, lt=1, description="Share of the budget in which it rises.")
    div_factor: float = Field(default=25.0, ge=1, description="It begins at the peak divided by this.")
    final_div_factor: float = Field(default=1e4, ge=1, description="It ends at its beginning over this.")
    anneal_strategy: Literal["cos", "linear"] = Field(default="cos", description="Half cosines, or lines.")

    @field_validator("warmup_steps")
    @classmethod
    def _own_rise(cls, given: float) -> float:
        if given:
            text = f"{given:g} is a second rise, and onecycle has its own, of schedule.pct_start"
            raise _refusal(f"{text}.   Leave schedule.warmup_steps out")
        return given


class InverseSqrtSchedule(_Leg):
    """1 / sqrt of the steps (arXiv:1706.03762)."""

    name: Literal["inverse_sqrt"] = Field(
        default="inverse_sqrt",
        description="1 / sqrt(1 + x / timescale) (arXiv:1706.03762); lands only with a last leg.",
    )
    timescale: float = Field(
        default=0.03,
        gt=0,
        description="Share of what follows the warm-up after which the rate has fallen to 1 / sqrt(2).",
    )
    decay_fraction: float = Field(default=0.0, ge=0, le=1, description=_LEG)


class PowerSchedule(_Leg):
    """A hold, then a power of the tokens (arXiv:2408.13359)."""

    name: Literal["power"] = Field(
        default="power",
        description="Hold the peak, then fall as tokens ** b (arXiv:2408.13359), with a last leg.",
    )
    b: float = Field(default=-0.51, lt=0, ge=-10, description="The power.")
    hold: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Share of what follows the warm-up that is spent at the peak. The default is ours; "
        "`shoestring.schedules.power_hold` works out the paper's from rate, batch and tokens.",
    )
    decay_fraction: float = Field(default=0.1, ge=0, le=1, description=_LEG)


class Piece(Section):
    """One piece of a piecewise schedule."""

    until: float = Field(gt=0, le=1, description="Where it ends, as a share of the budget; the last at 1.")
    profile: Literal[
        "constant", "linear", "cosine", "1-sqrt", "rex", "uba", "mirror_cosine", "square", "wsd"
    ] = Field(default="linear", description="Its shape, with the default options of the schedule.")
    start: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Where it begins, as a share of the peak; null is where the one before ends, or 1.",
    )
    end: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Where it ends, as a share of the peak; null is 0, and for constant where it begins.",
    )

    @field_validator("end")
    @classmethod
    def _constant_stays(cls, given: float | None, info: ValidationInfo) -> float | None:
        if given is not None and info.data.get("profile") == "constant" and given != info.data.get("start"):
            text = f"{given:g} is not where this constant piece begins, and it ends there"
            raise _refusal(f"{text}.   Leave end out, or set profile: linear")
        return given


class PiecewiseSchedule(_Decay):
    """Profiles one after the other."""

    name: Literal["piecewise"] = Field(default="piecewise", description="Profiles one after the other.")
    pieces: list[Piece] = Field(
        min_length=1,
        json_schema_extra={"x-allowed": "a list, each a mapping with until, profile, start, end"},
        description="Each from where the one before ended `until` a share of the budget: "
        "`[{until: 0.5, profile: constant}, {until: 1, profile: cosine}]`.",
    )

    @field_validator("pieces")
    @classmethod
    def _rising_to_one(cls, given: list[Piece]) -> list[Piece]:
        ends = [piece.until for piece in given]
        if ends[-1] != 1 or any(a >= b for a, b in pairwise(ends)):
            text = f"until is {ends}, and must rise from piece to piece and end at 1"
            raise _refusal(f"{text}.   For example {_repaired(ends)}")
        return given


def _repaired(ends: list[float]) -> list[float]:
    """The same shares in order, up to 1."""
    return [*sorted({end for end in ends if end < 1}), 1.0]


ScheduleConfig = Annotated[
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | PolynomialSchedule
    | RexSchedule
    | UbaSchedule
    | MirrorCosineSchedule
    | SquareSchedule
    | WsdSchedule
    | WsdSSchedule
    | OneCycleSchedule
    | InverseSqrtSchedule
    | PowerSchedule
    | PiecewiseSchedule,
    Field(discriminator="name"),
]
