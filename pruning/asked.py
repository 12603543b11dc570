"""What `prune` can be asked for: which method judges which parts, and what does not go together."""

from __future__ import annotations

from typing import Literal, get_args

from ..recipes.errors import UserError
from .head_amounts import HEAD_PARTS
from .narrow import check_pairs
from .refit import RIDGE

Method = Literal[
    "random", "magnitude", "wanda", "flap", "cfsp", "cfsp_weighted", "modegpt", "shortgpt", "foldgpt"
]
Widths = Literal["uniform", "per_layer"]
RatioOf = Literal["parameters", "latency"]
JUDGED: dict[str, tuple[str, ...]] = {
    "random": ("neurons", "groups", "blocks"),
    "magnitude": ("neurons", "groups"),
    "wanda": ("neurons", "groups"),
    "flap": ("neurons", "groups"),
    "cfsp": ("neurons",),
    "cfsp_weighted": ("neurons",),
    "modegpt": ("neurons", "queries", "values"),
    "shortgpt": ("blocks",),
    "foldgpt": ("blocks",),
}
_UNEVEN = ("flap", "cfsp", "cfsp_weighted")


def check_method(method: str, parts: tuple[str, ...], widths: str) -> tuple[str, ...]:
    """The parts in order, each once.

    Raises:
        UserError: a method, part or rule for widths that there is not.
    """
    if method not in JUDGED:
        raise UserError(f"pruning.method: {method} is not one of {', '.join(get_args(Method))}.")
    wrong = sorted(set(parts) - set(JUDGED[method]))
    if wrong:
        raise UserError(
            f"pruning.parts: {method} does not judge {', '.join(wrong)}; "
            f"allowed are {', '.join(JUDGED[method])}."
        )
    if widths not in get_args(Widths):
        raise UserError(f"pruning.widths: {widths} is not one of {', '.join(get_args(Widths))}.")
    if widths == "per_layer" and method not in _UNEVEN:
        raise UserError(
            f"pruning.widths: {method} has no rule for widths per layer; {', '.join(_UNEVEN)} have.\n"
            "  Use widths: uniform."
        )
    return tuple(sorted(set(parts)))


def check_target(ratio_of: str, parts: tuple[str, ...], family: str, *, tokens: int, timed: bool) -> None:
    """Refuse a ratio of something else, and parts that cannot be measured or cut.

    Raises:
        UserError: with what is allowed.
    """
    heads = sorted(set(parts) & set(HEAD_PARTS))
    if "queries" in parts:
        check_pairs(family)
    if ratio_of not in get_args(RatioOf):
        raise UserError(f"pruning.ratio_of: {ratio_of} is not one of {', '.join(get_args(RatioOf))}.")
    if ratio_of == "parameters" and timed:
        raise UserError(
            "pruning.times: they are read with ratio_of: latency alone.\n  Set it, or leave times out."
        )
    if ratio_of == "latency" and heads:
        raise UserError(
            "pruning.ratio_of: latency is measured for neurons, groups and blocks, not for "
            f"{', '.join(heads)}.\n  Use ratio_of: parameters, or parts: neurons."
        )
    if tokens < 1:
        raise UserError(f"pruning.latency_tokens: {tokens} is not possible; allowed is 1 (a step) or more.")


def check_updates(
    method: str, parts: tuple[str, ...], *, refit: bool, compensate: bool, ridge: float
) -> None:
    """Refuse updates of weights that do not go together, or have nothing to update.

    Raises:
        UserError: with what to leave out.
    """
    if not 0 < ridge < float("inf"):
        raise UserError(
            f"pruning.ridge: {ridge} is not possible; allowed is a number above 0, such as {RIDGE}."
        )
    if refit and (compensate or "neurons" not in parts):
        raise UserError(
            "pruning.refit: it fits down_proj to fewer neurons, so parts needs neurons, and it already "
            "carries their mean.\n  Leave out refit or compensate."
        )
    if compensate and (parts == ("blocks",) or method == "modegpt"):
        raise UserError(
            f"pruning.compensate: {method} on {', '.join(parts)} leaves no channels' means to put into a "
            "bias.\n  Leave it out."
        )
