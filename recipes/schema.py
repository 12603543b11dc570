"""The recipe: what the user asks for. A closed, frozen, serialisable pydantic model.

`None` in a key that accepts `auto` means that the plan decides it.
"""

from copy import deepcopy
from functools import cache
from typing import Any

from pydantic import Field, model_validator
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import WithDefaultSchema

from .checks import problems
from .choices import AdapterConfig, LoraAdapter
from .engine import EngineConfig, NativeEngineConfig
from .model_data import DataConfig, ModelConfig
from .objectives import ObjectiveConfig, SftObjective
from .offload import OffloadConfig
from .optimizers import AdamW, OptimizerConfig
from .pruning import PruningConfig
from .running import BudgetConfig, CheckpointConfig, EvalConfig, ExportConfig, TrackConfig, TrainConfig
from .schedules import RexSchedule, ScheduleConfig
from .section import Section
from .short_forms import SHORT_FORMS, expand_recipe


class _Defaults(GenerateJsonSchema):
    """Writes defaults as a recipe would: amounts as text, and `auto` where the plan decides."""

    def encode_default(self, dft: Any) -> Any:
        """The text of an amount; all else as pydantic does it."""
        return dft.text if hasattr(dft, "text") else super().encode_default(dft)

    def default_schema(self, schema: WithDefaultSchema) -> dict[str, Any]:
        """`auto` for null where null means it."""
        made = super().default_schema(schema)
        if "default" in made and made["default"] is None and {"const": "auto"} in made.get("anyOf", []):
            made["default"] = "auto"
        return made


class Recipe(Section):
    """Everything that a run is asked to do. None in a key means: the plan decides."""

    model: ModelConfig = Field(description="What is trained.")
    data: DataConfig = Field(description="What it is trained on and measured with.")
    budget: BudgetConfig = Field(
        description="What may be spent: at least one of time, cost, energy, tokens, steps, epochs. The "
        "first to run out counts."
    )
    objective: ObjectiveConfig = Field(default_factory=SftObjective, description="What the loss is.")
    adapter: AdapterConfig | None = Field(
        default_factory=LoraAdapter,
        description="What is trained beside the frozen model; left out it is LoRA of rank 16, and null "
        "trains every weight.",
    )
    optimizer: OptimizerConfig = Field(default_factory=AdamW, description="How a gradient becomes an update.")
    schedule: ScheduleConfig = Field(
        default_factory=RexSchedule, description="How the rate moves through the budget."
    )
    pruning: PruningConfig | None = Field(
        default=None, description="What is removed from the model for good; null removes nothing."
    )
    offload: OffloadConfig = Field(
        default_factory=OffloadConfig,
        description="Which part of the training state lives on the device, in host memory or on disk.",
    )
    engine: EngineConfig = Field(
        default_factory=NativeEngineConfig,
        description="What makes the steps, and cuts the training state up over several processes.",
    )
    train: TrainConfig = Field(default_factory=TrainConfig, description="How a step is made.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="When and how the model is measured.")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="How often the state is saved."
    )
    track: TrackConfig = Field(
        default_factory=TrackConfig, description="Where figures are logged besides the run directory."
    )
    export: ExportConfig = Field(default_factory=ExportConfig, description="What the run leaves in `final/`.")
    output_dir: str = Field(
        default="runs/run",
        min_length=1,
        description="The run directory; left out it is `runs/` and the recipe's file name.",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, given: Any) -> Any:
        return expand_recipe(given)

    @model_validator(mode="after")
    def _cross_checks(self) -> "Recipe":
        found = problems(self)
        if found:
            text = "; ".join(f"{problem.key}: {problem.text}" for problem in found)
            raise PydanticCustomError("cross_checks", "{text}", {"text": text, "problems": found})
        return self


@cache
def plain_schema() -> dict[str, Any]:
    """The JSON schema of the spelled-out form. Not to be changed by the caller."""
    return Recipe.model_json_schema(mode="validation", schema_generator=_Defaults)


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file, short forms included, for editors and other tools."""
    schema = deepcopy(plain_schema())
    for section in SHORT_FORMS:
        declared = schema["properties"][section]
        kinds = {"anyOf": [{"type": "string"}]}
        for key in ("$ref", "anyOf", "oneOf", "discriminator"):
            if key in declared:
                value = declared.pop(key)
                kinds["anyOf"] += [{key: value}] if key == "$ref" else [] if key == "discriminator" else value
        if section in ("data", "track"):
            kinds["anyOf"].append({"type": "array"})
        declared.update(kinds)
    source = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Source"}]}
    sources = {"type": "array", "minItems": 1, "items": source}
    data = schema["$defs"]["DataConfig"]["properties"]
    data["train"] = {**_without_type(data["train"]), "anyOf": [*source["anyOf"], sources]}
    share = next(kind for kind in data["eval"]["anyOf"] if kind.get("type") == "number")
    data["preferences"] = {**_without_type(data["preferences"]), "anyOf": [*source["anyOf"], sources]}
    data["eval"] = {**_without_type(data["eval"]), "anyOf": [share, *source["anyOf"], sources]}
    report_to = schema["$defs"]["TrackConfig"]["properties"]["report_to"]
    trackers = {key: report_to.pop(key) for key in ("type", "items")}
    report_to["anyOf"] = [{"enum": ["none", *trackers["items"]["enum"]]}, trackers]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "shoestring recipe", **schema}


def _without_type(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key in ("description", "default", "title")}
