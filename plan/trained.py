"""Which tensors are trained: shapes only, from the model on the meta device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import prod

from ..models.facts import ModelFacts
from ..recipes import Recipe

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trained:
    """Shapes of the trained tensors: of the model's own, and of those that the adapter adds."""

    own: tuple[Shape, ...]
    added: tuple[Shape, ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All of them."""
        return self.own + self.added

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def added_parameters(self) -> int:
        """Parameters that the base model does not have."""
        return sum(prod(shape) for shape in self.added)


def find_trained(recipe: Recipe, facts: ModelFacts) -> Trained:
    """What `recipe` trains. UserError: the adapter's targets do not match the model (from `adapters`)."""
    if recipe.adapter is None:
        return Trained(tuple(shape for _, shape in facts.parameter_shapes), ())
    import torch
    from peft import get_peft_model

    from ..adapters import lora_config
    from ..models.quiet import quiet_libraries

    # The start of the adapter needs weights, its shapes do not.
    adapter = recipe.adapter.model_copy(update={"init_lora_weights": True})
    with torch.device("meta"), quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT misses a name on the hub; nothing is saved
        model = get_peft_model(facts.skeleton(), lora_config(adapter, facts))
    base = {name for name, _ in facts.parameter_shapes}
    own: list[Shape] = []
    added: list[Shape] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            (own if plain in base else added).append(tuple(parameter.shape))
    return Trained(tuple(own), tuple(added))
