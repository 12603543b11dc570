"""Structured pruning: which neurons, groups of heads or layers leave the model, and when."""

from typing import Literal

from pydantic import Field

from .section import Auto, Section

PARTS = {
    "random": ("neurons", "groups", "blocks"),
    "magnitude": ("neurons", "groups"),
    "wanda": ("neurons", "groups"),
    "flap": ("neurons", "groups"),
    "cfsp": ("neurons",),
    "cfsp_weighted": ("neurons",),
    "modegpt": ("neurons",),
    "shortgpt": ("blocks",),
    "foldgpt": ("blocks",),
}
"""Criterion -> what it judges; the first is what goes where the recipe names none."""


class PruningConfig(Section):
    """What is removed from the model for good."""

    name: Literal[
        "random", "magnitude", "wanda", "flap", "cfsp", "cfsp_weighted", "modegpt", "shortgpt", "foldgpt"
    ] = Field(default="cfsp", description="Criterion by which the parts to remove are chosen.")
    ratio: float = Field(
        gt=0,
        lt=1,
        description="Share of all parameters that leaves, embedding included; or of the time, see ratio_of.",
    )
    ratio_of: Literal["parameters", "latency"] = Field(
        default="parameters",
        description="`latency` measures the layers on this machine and removes as much as makes the forward "
        "pass by `ratio` shorter.",
    )
    latency_tokens: int = Field(
        default=1,
        ge=1,
        description="What `ratio_of: latency` measures: 1 is a step of writing an answer, more is reading a "
        "prompt of so many tokens.",
    )
    parts: Auto[list[Literal["neurons", "groups", "blocks"]]] = Field(
        default=None,
        min_length=1,
        description="Neurons of the MLPs, groups of attention heads, or whole layers (alone); auto is the "
        "first that the criterion judges.",
    )
    multiple: int = Field(
        default=1,
        ge=1,
        description="The MLP width that stays is a multiple of this: 64 or 128 suit GPUs, 256 the K-quants "
        "of GGUF.",
    )
    refit: Auto[bool] = Field(
        default=None,
        description="Fit down_proj again to the neurons that stay, by least squares on the calibration "
        "tokens; auto does where neurons leave and nothing is compensated.",
    )
    ridge: float = Field(
        default=1.0, gt=0, description="Draws the refit towards the weights as they were; more is nearer."
    )
    compensate: bool = Field(
        default=False, description="Put the mean effect of what leaves into biases (FLAP)."
    )
    calibration_tokens: Auto[int] = Field(
        default=None,
        ge=1,
        description="Tokens of the training rows that the criterion looks at, each time; auto is 8,192 on a "
        "CPU and 131,072 on a GPU.",
    )
    start: Auto[float] = Field(
        default=None,
        ge=0,
        lt=1,
        description="Progress through the budget at which pruning begins; 0 prunes before training. auto is "
        "0.25 where every weight is trained in a way that can be cut on the way, else 0.",
    )
    end: Auto[float] = Field(
        default=None,
        ge=0,
        lt=1,
        description="Progress at which the last part leaves; auto is 0.75, or start where that is later.",
    )
    rounds: int = Field(
        default=4,
        ge=1,
        le=100,
        description="Cuts between start and end, large ones first: after round i of n, 1 - (1 - i/n)^3 of "
        "the ratio is gone.",
    )

    @property
    def chosen_parts(self) -> tuple[str, ...]:
        """What leaves, with the criterion's own where the recipe names nothing."""
        return PARTS[self.name][:1] if self.parts is None else tuple(self.parts)
