"""Which way to run fits: tier of the state, layers computed again or swapped, micro-batch."""

from __future__ import annotations

from . import defaults
from .fit import Candidate, choose
from .grounds import Grounds


def pick(grounds: Grounds) -> Candidate | None:
    """The best micro-batch that fits; activations are computed again or swapped only if needed or asked for.

    The optimizer's state is moved only where that is not enough.
    """
    wanted, layers = grounds.wanted_checkpointing, grounds.around.facts.layers
    for tier in grounds.tiers:
        for recomputed in (0, layers) if wanted is None else (layers * wanted,):
            swapped = layers - recomputed if grounds.swaps == "always" else 0
            chosen = choose(grounds.find(recomputed, tier=tier, swapped=swapped), grounds.around.limits)
            if chosen is not None:
                return _quickest(grounds, chosen) if wanted is None else chosen
    return None


def smallest(grounds: Grounds) -> Candidate:
    """The candidate that needs least, whether it fits or not."""
    recomputed = 0 if grounds.wanted_checkpointing is False else grounds.around.facts.layers
    found = [candidate for tier in grounds.tiers for candidate in grounds.find(recomputed, tier=tier)]
    return min(found, key=lambda c: (c.footprint.device_total, c.footprint.host_total))


def _quickest(grounds: Grounds, chosen: Candidate) -> Candidate:
    """The same micro-batch with as few layers computed again as fit, or swapped where that is quicker."""
    fewest = _fewest(grounds, chosen, chosen.swapped, chosen.recomputed)
    if not fewest.recomputed or grounds.swaps != "auto":
        return fewest
    found = [fewest]
    layers = grounds.around.facts.layers
    for swapped in range(1, layers + 1):
        found.append(_fewest(grounds, fewest, swapped, layers - swapped))
    fitting = [one for one in found if _fits(grounds, one)] or [fewest]
    return min(fitting, key=lambda one: one.seconds_per_token)


def _fewest(grounds: Grounds, like: Candidate, swapped: int, most: int) -> Candidate:
    """The micro-batch and tier of `like`, and as few layers computed again as leave the margin free; else
    `most`.
    """
    for recomputed in range(most):
        (fewer,) = grounds.find(recomputed, like.micro_tokens, like.tier, swapped)
        if _fits(grounds, fewer):
            return fewer
    return grounds.find(most, like.micro_tokens, like.tier, swapped)[0]


def _fits(grounds: Grounds, one: Candidate) -> bool:
    return grounds.around.limits.fits(one.footprint, defaults.MEMORY_MARGIN)
