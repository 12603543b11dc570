"""How many neurons, pairs and values must go for a share of all parameters to go: exact integers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from ..recipes.errors import UserError
from .anatomy import Anatomy

HEAD_PARTS = ("queries", "values")


@dataclass(frozen=True)
class HeadAmounts:
    """What every layer keeps: neurons, rotary pairs of each head of q and k, values of each head of v."""

    neurons: int
    pairs: int
    values: int
    parameters: int
    ratio: float


def head_amounts_for(
    anatomy: Anatomy, ratio: float, *, parts: Collection[str], multiple: int = 1
) -> HeadAmounts:
    """The numbers to keep so that `ratio` of all parameters (embedding included) is removed.

    `parts` are of "queries", "values" and "neurons": each loses the same share of its parameters. Pairs are
    rounded to the nearest, then values, and what stands last of these three makes up what rounding left: the
    ratio is reached. Neurons stay in multiples of `multiple`. One of each stays. Layers have the same widths
    before.

    Raises:
        UserError: the ratio is not in (0, 1), or layers differ, or the parts do not reach the ratio.
    """
    if not 0 < ratio < 1:
        raise UserError(f"pruning.ratio: {ratio} is not a share of all parameters; allowed is 0 < ratio < 1.")
    shapes = {(b.neurons, b.groups, b.query_dim, b.value_dim) for b in anatomy.blocks}
    if len(shapes) > 1:
        raise UserError(
            "pruning.ratio: layers differ in width, and equal ones are needed here.\n"
            "  Prune neurons and heads in one call, or with widths: uniform."
        )
    first, layers = anatomy.blocks[0], len(anatomy.blocks)
    target = Fraction(str(float(ratio))) * anatomy.parameters
    units = {
        "queries": (first.query_dim // 2, layers * first.pair_parameters, 1),
        "values": (first.value_dim, layers * first.value_parameters, 1),
        "neurons": (first.neurons, layers * first.neuron_parameters, multiple),
    }
    listed = [name for name in units if name in parts]
    prunable = sum(units[name][0] * units[name][1] for name in listed)
    kept = {name: units[name][0] for name in units}
    gone = 0
    for name in listed:
        count, cost, step = units[name]
        if name == listed[-1]:
            # what is left for the last to remove, rounded up
            wanted = count - max(0, -int(-(target - gone) // cost))
        else:
            wanted = max(1, round(count * (1 - target / prunable)))
        kept[name] = wanted // step * step if wanted < count else count
        gone += (count - kept[name]) * cost
    if min(kept.values()) < 1:
        most = sum((units[name][0] - units[name][2]) * units[name][1] for name in listed)
        raise UserError(
            f"pruning.ratio: {ratio} of all parameters cannot leave with {', '.join(listed)}: the embedding, "
            "the head and one of each must stay.\n"
            f"  At most {most / anatomy.parameters:.3f} can; use a smaller ratio or more parts."
        )
    return HeadAmounts(
        kept["neurons"], kept["queries"], kept["values"], anatomy.parameters - gone, gone / anatomy.parameters
    )
