"""How many neurons, groups or blocks must go for a share of all parameters to go: exact integers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from ..recipes.errors import UserError
from .anatomy import Anatomy
from .forms import check_biases, groups_that_save

PARTS = ("neurons", "groups", "blocks")


@dataclass(frozen=True)
class Amounts:
    """What every layer keeps, how many layers stay, and the parameters of the whole model then."""

    neurons: int
    groups: int
    blocks: int
    parameters: int
    ratio: float


def amounts_for(
    anatomy: Anatomy,
    ratio: float,
    *,
    parts: Collection[str] = ("neurons",),
    multiple: int = 1,
    compensate: bool = False,
) -> Amounts:
    """The numbers to keep so that `ratio` of all parameters (embedding included) is removed.

    `parts` is {"blocks"}, or "neurons", "groups" or both. Neurons and groups lose the same share of their
    parameters, groups rounded to whole ones; neurons then make up what rounding left. The width that stays is
    a multiple of `multiple`, the largest that reaches the ratio. Groups alone and blocks are rounded to the
    nearest, at least one removed. The number of groups is one that a plain class can hold (forms.py), with
    compensating biases where `compensate` is set. Layers have the same widths before. New biases are not
    counted.

    Raises:
        UserError: the ratio is not in (0, 1), the parts are not possible or do not reach the ratio, or no
            class holds the biases.
    """
    check_request(anatomy, ratio, parts, "all parameters")
    if compensate:
        check_biases(anatomy, down="neurons" in parts, o="groups" in parts)
    first, layers = anatomy.blocks[0], len(anatomy.blocks)
    target = Fraction(str(float(ratio))) * anatomy.parameters
    neurons, groups, blocks = first.neurons, first.groups, layers
    if "blocks" in parts:
        blocks -= max(1, round(target / first.parameters))
    both = "neurons" in parts and "groups" in parts
    group_cost, neuron_cost = layers * first.group_parameters, layers * first.neuron_parameters
    if "groups" in parts:
        prunable = group_cost * groups + (neuron_cost * neurons if both else 0)
        exact = groups * target / prunable
        groups = _groups(anatomy, exact, target / group_cost if both else None, compensate, parts)
    if "neurons" in parts:
        rest = target - group_cost * (first.groups - groups)
        neurons -= max(0, -int(-rest // neuron_cost))
        neurons = neurons // multiple * multiple
    if min(neurons, groups, blocks) < 1:
        raise UserError(_too_much(anatomy, ratio, parts, multiple))
    gone = (first.neurons - neurons) * neuron_cost + (first.groups - groups) * group_cost
    gone += (layers - blocks) * first.parameters
    return Amounts(neurons, groups, blocks, anatomy.parameters - gone, gone / anatomy.parameters)


def _groups(
    anatomy: Anatomy, exact: Fraction, most: Fraction | None, compensate: bool, parts: Collection[str]
) -> int:
    """The groups to keep: the count that saves and removes nearest to `exact`, at most `most` if given.

    With neurons groups never go beyond the ratio, since neurons make up what is missing; alone they lose at
    least one. 0 when none can be.
    """
    present = anatomy.blocks[0].groups
    savable = groups_that_save(anatomy, down=compensate and "neurons" in parts, o=compensate)
    fits = [n for n in savable if (n < present if most is None else present - n <= most)]
    if most is None and exact >= present:
        return 0
    return min(fits, key=lambda n: abs(present - n - exact), default=0 if most is None else present)


def prunable_parameters(anatomy: Anatomy, parts: Collection[str]) -> int:
    """Parameters of the neurons and of the groups that `parts` names."""
    total = 0
    for block in anatomy.blocks:
        total += block.neurons * block.neuron_parameters * ("neurons" in parts)
        total += block.groups * block.group_parameters * ("groups" in parts)
    return total


def check_request(anatomy: Anatomy, ratio: float, parts: Collection[str], of: str) -> None:
    """Refuse a ratio or parts that no model could meet, and layers that differ already.

    Raises:
        UserError: with what is allowed.
    """
    if not 0 < ratio < 1:
        raise UserError(f"pruning.ratio: {ratio} is not a share of {of}; allowed is 0 < ratio < 1.")
    if not parts or set(parts) - set(PARTS) or ("blocks" in parts and len(set(parts)) > 1):
        raise UserError(
            f"pruning.parts: {sorted(parts)} is not possible; allowed are neurons, groups, both, or blocks "
            "alone.\n  For depth and width prune twice: blocks first."
        )
    shapes = {(b.neurons, b.groups, b.query_dim, b.value_dim) for b in anatomy.blocks}
    if len(shapes) > 1:
        raise UserError(
            f"pruning.ratio: layers differ in width: {sorted(shapes)} (neurons, groups, channels of heads of "
            "q, of v); equal ones are needed here.\n  Give the counts of each layer yourself: keep_counts."
        )
    if set(parts) == {"groups"} and anatomy.blocks[0].groups == 1:
        raise UserError(
            "pruning.parts: the model has one group of heads (one head of keys and values), so none can go.\n"
            "  Use parts: neurons, or blocks."
        )


def _too_much(anatomy: Anatomy, ratio: float, parts: Collection[str], multiple: int) -> str:
    first, layers = anatomy.blocks[0], len(anatomy.blocks)
    most = 0
    if "blocks" in parts:
        most = (layers - 1) * first.parameters
    if "neurons" in parts:
        most += layers * (first.neurons - min(multiple, first.neurons)) * first.neuron_parameters
    if "groups" in parts:
        most += layers * (first.groups - 1) * first.group_parameters
    return (
        f"pruning.ratio: {ratio} of all parameters cannot leave with {', '.join(sorted(parts))}: the "
        "embedding, the head and one of each must stay.\n"
        f"  At most {most / anatomy.parameters:.3f} can; use a smaller ratio or more parts."
    )
