"""Which plain transformers classes can hold a pruned model's shape.

Llama, Mistral and Qwen2 compute the same block; they differ in what their configs allow. Llama, Gemma 2 and
Gemma 3 want the hidden size divisible by the number of heads, even where `head_dim` is given. Only Llama has
biases for the whole MLP and only Llama, Qwen3 and the Gemmas one for o_proj. Llama has no attention windows.
"""

from __future__ import annotations

from ..recipes.errors import UserError
from .anatomy import Anatomy

_DIVIDES = {"llama", "gemma2", "gemma3_text"}
_OUTPUT_BIAS = {"llama", "qwen3", "gemma", "gemma2", "gemma3_text"}
_MLP_BIAS = {"llama"}
_EQUALS = {"llama": ("mistral",), "mistral": ("llama",), "qwen2": ("llama",)}


def choose_form(anatomy: Anatomy) -> str:
    """The model type that the model is saved as: its own, or one that computes the same.

    Raises:
        UserError: none can hold it, with each one's reason.
    """
    reasons = _reasons(anatomy, anatomy.blocks[0].groups, down=False, o=False)
    for form, reason in reasons.items():
        if reason is None:
            return str(form)
    told = "; ".join(f"{form} {reason}" for form, reason in reasons.items())
    fit = ", ".join(map(str, groups_that_save(anatomy, down=False, o=False))) or "none"
    raise UserError(
        f"pruning: no plain class holds this model: {told}.\n"
        f"  Fewer groups of heads that one holds: {fit}; or prune neurons or blocks only, without "
        "compensation."
    )


def groups_that_save(anatomy: Anatomy, *, down: bool, o: bool) -> list[int]:
    """Numbers of groups, up to the present one, that some class holds when `down` and `o` get new biases."""
    return [
        groups
        for groups in range(1, anatomy.blocks[0].groups + 1)
        if None in _reasons(anatomy, groups, down=down, o=o).values()
    ]


def groups_to_declare(anatomy: Anatomy) -> int:
    """At least the groups of the widest layer, so that the family's config takes the number of heads."""
    first, most = anatomy.blocks[0], max(block.groups for block in anatomy.blocks)
    hidden = first.q.in_features
    if anatomy.family not in _DIVIDES:
        return most
    return next(n for n in range(most, hidden + 1) if hidden % (n * first.heads_per_group) == 0)


def check_biases(anatomy: Anatomy, *, down: bool, o: bool) -> None:
    """Refuse biases that no plain class of this family can hold, before they are added.

    Raises:
        UserError: with the families that can, and what to do instead.
    """
    forms = {anatomy.family, *_EQUALS.get(anatomy.family, ())}
    if anatomy.has_windows:
        forms -= {"llama"}
    for wanted, able, name in ((down, _MLP_BIAS, "down_proj"), (o, _OUTPUT_BIAS, "o_proj")):
        if wanted and not forms & able:
            raise UserError(
                f"pruning.compensate: {anatomy.family} models cannot hold a bias of {name}; it is allowed "
                f"for {', '.join(sorted(able))}.\n  Leave it out, or refit down_proj instead: refit."
            )


def _reasons(anatomy: Anatomy, groups: int, *, down: bool, o: bool) -> dict[str, str | None]:
    """For each class that computes the same: why it cannot hold so many groups with these biases, or None."""
    first = anatomy.blocks[0]
    biased = (
        first.q.bias is not None or first.v.bias is not None,
        o or first.o.bias is not None,
        down or first.down.bias is not None,
    )
    heads = groups * first.heads_per_group
    forms = (anatomy.family, *_EQUALS.get(anatomy.family, ()))
    return {form: _objection(form, anatomy, heads, biased) for form in forms}


def _objection(form: str, anatomy: Anatomy, heads: int, biased: tuple[bool, bool, bool]) -> str | None:
    inputs, output, mlp = biased
    hidden = anatomy.blocks[0].q.in_features
    if form in _DIVIDES and hidden % heads:
        return f"needs its hidden size ({hidden}) divisible by its heads ({heads})"
    if (output and form not in _OUTPUT_BIAS) or (inputs and form == "mistral"):
        return "has no attention biases like these"
    if mlp and form not in _MLP_BIAS:
        return "has no MLP biases"
    if form == "llama" and anatomy.has_windows:
        return "has no attention windows"
    return None
