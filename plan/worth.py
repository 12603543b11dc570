"""Lines on where the budget pays: epochs, repeats, filters, sources, objectives."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ..recipes import Recipe
from ..schedules.limits import Limits
from .budget import Spending, currency, short
from .objectives import Work
from .refusal import gigabytes
from .repetition import (
    FEW_EPOCHS,
    Repeats,
    filter_break_even,
    worn_source,
)

ENOUGH = 0.95
"""Of what the whole budget teaches: the smaller budget that is named gives so much. Ours."""
NEARLY_ALL = 0.9
"""Of what fresh rows teach: nothing to say above. About 4 passes."""
WORN = 0.5
"""It is named where a further token is worth less than this of a fresh one. Ours."""


@dataclass(frozen=True)
class Stored:
    """A teacher's pass before training: tokens that it sees, seconds, bytes on disk."""

    tokens: int
    seconds: float
    bytes: int


def epochs_line(recipe: Recipe, repeats: Repeats, limits: Limits, spending: Spending) -> str:
    """What the epochs that the budget buys are worth, and whether less of it would do."""
    epochs = repeats.epochs
    if epochs < 1.0:
        share = f"{epochs:.0%}" if epochs >= 0.01 else f"{epochs:.1g}"
        return (
            f"{share} of the tokens, rows drawn at random, each once; dropping the worst rows costs nothing"
        )
    same = f"teach like {repeats.effective:.3g} of fresh rows"
    if repeats.effective >= NEARLY_ALL * epochs:
        return f"{_times(epochs)} passes {same}: repeats cost almost nothing"
    worth = "next to nothing" if repeats.next_worth < 0.01 else f"{repeats.next_worth:.2g} of a fresh one"
    line = f"{_times(epochs)} passes {same}; a further token is worth {worth}"
    if repeats.next_worth >= WORN:
        return line
    less = _less(repeats.share_worth(ENOUGH), recipe, limits, spending)
    return f"{line}. {less} gives {ENOUGH:.0%} of that"


def filter_line(repeats: Repeats) -> str | None:
    """How good a filter must be to pay; None where rows are left over anyway."""
    if repeats.epochs < 1.0:
        return None
    needed = filter_break_even(repeats.epochs, 0.5)
    return f"keeping half of the rows pays if one of them is worth {needed:.2f} of the mean row"


def sources_line(recipe: Recipe, repeats: Repeats) -> str | None:
    """The source that is worn out before the others, with the weight that would even it; None without one."""
    found = worn_source(repeats.sources)
    if found is None:
        return None
    source, others, weight = found
    path = recipe.data.train[source.number].path
    return (
        f"{path} is seen {_times(source.passes)} times, the others {others:.2g} times: "
        f"data.train.{source.number}.weight={weight:g} makes that {FEW_EPOCHS:g}"
    )


def decay_line(recipe: Recipe, repeats: Repeats) -> str:
    """Why the weight decay is what it is."""
    if recipe.optimizer.weight_decay is not None:
        return "optimizer.weight_decay"
    if repeats.epochs <= FEW_EPOCHS:
        return f"none up to {FEW_EPOCHS:g} passes over the rows"
    on = "on the adapter, towards the base" if recipe.adapter is not None else "on all weights, towards zero"
    return f"{_times(repeats.epochs)} passes: repeated rows want more of it (arXiv:2509.14786); {on}"


def objective_line(work: Work, *, reference: int, tokens: int, targets: float, stored: Stored) -> str | None:
    """What the objective adds to each step, or before training; None for supervised fine-tuning."""
    extra = work.extra
    added = 1.0 - work.measured.micro_seconds(work.layers, tokens, targets) / work.train_seconds(
        tokens, targets
    )
    if extra.forwards:
        what = (
            f"a frozen copy of what is trained, {gigabytes(reference)}"
            if extra.reference
            else "the model without its adapter"
        )
        return f"the reference is {what}; its pass is {added:.0%} of a step"
    teacher = extra.teacher
    if teacher is None:
        return None
    size = f"a teacher of {short(teacher.parameters)} parameters, {gigabytes(teacher.bytes)}"
    if not teacher.stored:
        return f"{size}, runs in every step and is {added:.0%} of it"
    return (
        f"{size}, runs once over {short(stored.tokens)} tokens, {stored.seconds:.0f} s; "
        f"{gigabytes(stored.bytes)} on disk"
    )


def _less(share: float, recipe: Recipe, limits: Limits, spending: Spending) -> str:
    """The budget, in the unit of the limit that binds, that trains `share` of what this one does."""
    timeline = spending.timeline
    if "other stage" in timeline.parts:
        return f"{share:.0%} of this stage"
    match spending.bound_by:
        case "budget.steps":
            # A batch that the plan chooses would shrink with the steps.
            train, batch = recipe.train, spending.step.tokens
            own = train.batch_tokens is None and train.per_device_train_batch_size is None
            return f"budget.steps={ceil(share * timeline.steps)}" + f" train.batch_tokens={batch}" * own
        case "budget.tokens":
            return f"budget.tokens={short(share * timeline.tokens)}"
        case "budget.epochs":
            return f"budget.epochs={share * (limits.epochs or 0.0):.2g}"
    seconds = timeline.total - (1.0 - share) * timeline.parts["training"]
    if spending.bound_by == "budget.cost":
        cost = seconds / 3600 * (limits.price_per_hour or 0.0)
        return f'budget.cost="{cost:.2g} {currency(recipe)}"'
    if spending.bound_by == "budget.energy":
        return f"budget.energy={seconds / timeline.total * (limits.joules or 0.0) / 3.6e6:.2g}kWh"
    return f"budget.time={ceil(seconds / 60)}min" if seconds >= 600 else f"budget.time={ceil(seconds)}s"


def _times(passes: float) -> str:
    return f"{passes:,.0f}" if passes >= 100 else f"{passes:.3g}"
