"""PEFT's tuners besides LoRA, as a recipe names them."""

from typing import Any, Literal

from pydantic import Field

from .section import Section
from .target_keys import Excluded, Layers, Targets

PeftType = Literal[
    "c3a",
    "deft",
    "delora",
    "fourierft",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "loha",
    "lokr",
    "miss",
    "oft",
    "peanut",
    "psoft",
    "randlora",
    "road",
    "supertuning",
    "tinylora",
    "vblora",
    "vera",
    "waveft",
]

NOT_ON_4BIT = (
    "deft",
    "delora",
    "glora",
    "hra",
    "ia3",
    "loha",
    "lokr",
    "peanut",
    "psoft",
    "randlora",
    "road",
    "supertuning",
    "tinylora",
)
"""Types that PEFT does not train on weights packed in 4 bits: most read the weight itself, and `ia3`,
`randlora` and `road` make bfloat16 activations float32 there."""


class PeftAdapter(Section):
    """A tuner of PEFT; `options` are the fields of its configuration, with PEFT's names and defaults."""

    name: Literal["peft"] = Field(
        default="peft", description="Another tuner of PEFT, by `peft_type` (docs/adapters.md)."
    )
    peft_type: PeftType = Field(description="Which of PEFT's tuners.")
    options: dict[str, Any] = Field(
        default={},
        json_schema_extra={"x-allowed": "a mapping with fields of this type's configuration in PEFT"},
        description="Fields of the type's own configuration, such as `{r: 128}`; what is left out has PEFT's "
        "default. Where it is put, how it starts and what is trained beside it are not among them.",
    )
    target_modules: Targets = "all-linear"
    exclude_modules: Excluded = None
    layers_to_transform: Layers = None
