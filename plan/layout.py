"""Packed or padded, and how long a row may be: what the data and the model decide before any measurement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..recipes import Recipe
from ..recipes.errors import UserError, in_columns
from .facts import DataFacts


@dataclass(frozen=True)
class Layout:
    """How rows become sequences. max_length: tokens of the longest sequence, after cutting."""

    packed: bool
    packed_reason: str
    max_length: int
    max_length_reason: str


def choose_layout(recipe: Recipe, data: DataFacts, *, max_positions: int, can_pack: bool) -> Layout:
    """Decide packing and max_length.

    Raises UserError: packing asked for where the model or the attention cannot keep rows apart; no rows.
    """
    if data.rows == 0:
        raise UserError(
            in_columns([("data.train", "no rows are left to train on.   See why: shoestring check RECIPE")])
        )
    packed, packed_reason = _packing(recipe, data, can_pack)
    given = recipe.data.max_length
    longest = data.longest_sequence
    if given is not None and given < longest:
        count = data.longer_than(given)
        return Layout(packed, packed_reason, given, f"data.max_length={given}: {count} rows are longer")
    if longest > max_positions:
        count = data.longer_than(max_positions)
        reason = f"the model ends at {max_positions} tokens; {count} rows are longer"
        return Layout(packed, packed_reason, max_positions, reason)
    return Layout(packed, packed_reason, longest, f"the longest row has {longest} tokens")


def _packing(recipe: Recipe, data: DataFacts, can_pack: bool) -> tuple[bool, str]:
    wanted, attention = recipe.data.packing, recipe.model.attn_implementation
    possible = can_pack and attention is None
    if wanted and not possible:
        why = (
            f"model.attn_implementation={attention} would let rows of one sequence see each other"
            if attention is not None
            else "this architecture's attention cannot keep rows of one sequence apart"
        )
        raise UserError(
            in_columns([("data.packing", f"true was given, but {why}.\nLeave it out: data.packing=auto")])
        )
    if wanted is False:
        return False, "data.packing=false"
    if not possible:
        return False, "rows cannot share a sequence here, so rows of like length share a padded batch"
    waste = padding_share(data.sequences, 8)
    return True, f"no padding; padded batches of 8 random rows would be {waste:.0%} padding"


def padding_share(lengths: np.typing.NDArray[np.int64], rows: int) -> float:
    """Share of padding in batches of `rows` rows drawn in random order."""
    order = np.random.default_rng(0).permutation(lengths)[: len(lengths) // rows * rows]
    if len(order) == 0:
        return 0.0
    batches = order.reshape(-1, rows)
    return float(1 - batches.sum() / (batches.max(axis=1).sum() * rows))
