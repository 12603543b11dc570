"""In which type the weights are held and the arithmetic is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models.weights import resolve_dtype
from ..recipes import Recipe


@dataclass(frozen=True)
class Precision:
    """weights: type of the unquantised base. autocast: bfloat16 arithmetic over float32 weights."""

    weights: str
    autocast: bool
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights as torch names it."""
        dtype: torch.dtype = getattr(torch, self.weights)
        return dtype


def choose_precision(recipe: Recipe, device: torch.device) -> Precision:
    """Follow `model.dtype`; by default a frozen base is bfloat16, and trained weights are float32.

    An update of AdamW is about rate · sign: at 5e-5 on a weight of 0.05 it is a thousandth, below half a unit
    in the last place of bfloat16 (2^-9), and would be rounded away. Hence float32 weights, bfloat16 products.
    """
    dtype = resolve_dtype(recipe.model, full=recipe.adapter is None, device=device)
    name = str(dtype).removeprefix("torch.")
    if recipe.model.dtype is not None:
        return Precision(name, False, f"model.dtype={name}: weights and arithmetic")
    if recipe.adapter is None:
        return Precision(name, True, f"{name} weights, bfloat16 products: small updates to bfloat16 are lost")
    held = "4 bits" if recipe.model.load_in_4bit else name
    return Precision(name, False, f"the base is frozen, so it is held in {held}; the adapter in float32")
