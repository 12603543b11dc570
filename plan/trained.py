"""Which tensors are trained: names, shapes and roles only, from the model on the meta device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from ..models.facts import ModelFacts
from ..optimizers import state_bytes
from ..optimizers.badam import trained_names
from ..optimizers.roles import Slot, slots
from ..recipes import BAdam, Recipe
from ..recipes.errors import UserError


@dataclass(frozen=True)
class Trained:
    """The trained tensors: the model's own, and those that the adapter adds.

    factors: numbers that the adapter holds beside the base without training them.
    """

    own: tuple[Slot, ...]
    added: tuple[Slot, ...]
    factors: int = 0

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All of them."""
        return self.own + self.added

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return sum(slot.elements for slot in self.slots)

    @property
    def added_parameters(self) -> int:
        """Parameters that the base model does not have."""
        return sum(slot.elements for slot in self.added)


def find_trained(recipe: Recipe, facts: ModelFacts) -> Trained:
    """What `recipe` trains. UserError: the adapter's targets do not match the model (from `adapters`)."""
    if recipe.adapter is None:
        return Trained(tuple(_ever_trained(recipe, slots(facts.skeleton()))), ())
    from ..adapters import frozen_factors, on_meta
    from ..models.quiet import quiet_libraries

    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT misses a name on the hub; nothing is saved
        model = on_meta(recipe.adapter, facts)
    base = {name for name, _ in facts.parameter_shapes}
    own: list[Slot] = []
    added: list[Slot] = []
    for slot in _ever_trained(recipe, slots(model)):
        plain = slot.name.removeprefix("base_model.model.").replace(".base_layer", "")
        (own if plain in base else added).append(slot)
    return Trained(tuple(own), tuple(added), frozen_factors(model))


def _ever_trained(recipe: Recipe, found: list[Slot]) -> list[Slot]:
    """BAdam leaves some tensors alone for good. UserError: the model has too few layers for it."""
    if not isinstance(recipe.optimizer, BAdam):
        return found
    try:
        state_bytes(recipe.optimizer, found, torch.float32)
    except ValueError as error:
        raise UserError(f"optimizer.name  badam: {error}") from None
    names = set(trained_names((slot.name for slot in found), recipe.optimizer))
    return [slot for slot in found if slot.name in names]
