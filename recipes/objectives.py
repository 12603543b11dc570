"""The objectives that a recipe may name: what the loss is.

`shoestring.train.objectives.build_objective` turns each into three functions.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .section import Auto, Section


class SftObjective(Section):
    """Supervised fine-tuning."""

    name: Literal["sft"] = Field(default="sft", description="Cross entropy on the trained tokens.")


class _Preferences(Section):
    """What training on pairs of answers shares."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="How dear it is to leave the reference model (arXiv:2305.18290, equation 7).",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Share of pairs that are taken to be labelled the wrong way round (cDPO).",
    )
    sft_weight: float = Field(
        default=0.0,
        ge=0,
        description="Adds the mean cross entropy of the chosen answer, times this (RPO, arXiv:2404.19733).",
    )
    reference: Auto[Literal["adapter_off", "frozen"]] = Field(
        default=None,
        description="The reference model: the base with the adapter switched off (costs no memory; right "
        "when the adapter started from no change), or a frozen copy of the trained weights as they were "
        "when training on pairs began; auto takes the first where it is right.",
    )


class DpoObjective(_Preferences):
    """Direct preference optimisation (arXiv:2305.18290)."""

    name: Literal["dpo"] = Field(
        default="dpo",
        description="Direct preference optimisation (arXiv:2305.18290) on rows with prompt, chosen and "
        "rejected.",
    )


class SftThenDpoObjective(_Preferences):
    """One budget over supervised and preference data."""

    name: Literal["sft_then_dpo"] = Field(
        default="sft_then_dpo",
        description="First sft on `data.train`, then dpo on `data.preferences`, inside one budget.",
    )
    split: Auto[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=None,
        description="Share of the budget for sft; auto follows the published thresholds (arXiv:2502.11284) "
        "and prints why.",
    )
    dpo_learning_rate: Auto[Annotated[float, Field(gt=0)]] = Field(
        default=None, description="Peak rate of the dpo stage; auto is a tenth of the sft stage's."
    )


class DistillObjective(Section):
    """Learning from a teacher's distribution."""

    name: Literal["distill"] = Field(
        default="distill",
        description="The teacher's distribution over the next token, at the trained positions "
        "(arXiv:1503.02531).",
    )
    teacher: str = Field(
        min_length=1,
        description="The teacher, named as `model.model_name_or_path` names a model; it must have the "
        "same vocabulary.",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Softens both distributions; the loss is scaled by its square."
    )
    alpha: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Weight of the teacher's term; the cross entropy of the data has 1 - alpha.",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="Compare the teacher's so many likeliest tokens, and the rest as one; null compares all.",
    )
    teacher_logits: Literal["online", "stored"] = Field(
        default="online",
        description="`online` runs the teacher in every step; `stored` runs it once over all rows, keeps "
        "top_k logits of each position on disk for this run and later ones, and frees the teacher.",
    )


class OwnObjective(Section):
    """A user's own objective: three functions."""

    name: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
        json_schema_extra={"x-allowed": "your own as module:attribute"},
        description="An objective of your own, as `module:attribute`.",
    )


def _kind(given: Any) -> str | None:
    """The tag of an objective: its name, or `own` for a name with a colon; None is no objective."""
    name = given.get("name") if isinstance(given, dict) else getattr(given, "name", None)
    if isinstance(name, str) and ":" in name:
        return "own"
    return name if isinstance(name, str) else None


ObjectiveConfig = Annotated[
    Annotated[SftObjective, Tag("sft")]
    | Annotated[DpoObjective, Tag("dpo")]
    | Annotated[SftThenDpoObjective, Tag("sft_then_dpo")]
    | Annotated[DistillObjective, Tag("distill")]
    | Annotated[OwnObjective, Tag("own")],
    Discriminator(_kind),
]
